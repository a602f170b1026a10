# Names shared by the HAG-MIL recipes. Override any of them in the environment:
#   SLIDES=/data/slides LABELS=/data/labels.csv LABEL_DICT=normal:0,tumor:1 bash scripts/hag_mil/1_create_patches.sh
# The defaults are the cohort that `make demo` builds.
SLIDES=${SLIDES:-demo/slides}            # folder of slides
SLIDE_EXT=${SLIDE_EXT:-.tif}
LABELS=${LABELS:-demo/cohort.csv}        # csv: case_id, slide_id, label
LABEL_DICT=${LABEL_DICT:-skin:0,colon:1} # label text to class number
OUT=${OUT:-demo/hag_mil}                 # results of all steps
COARSE=${COARSE:-2}                      # pyramid level of the coarsest patches
FINER=${FINER:-1}                        # the finer levels, coarse to fine; with CAMELYON16: 1 0
PATCH=${PATCH:-64}                       # side of a patch, px of its level
ENCODER=${ENCODER:-efficientnet_lite0}
EMBED_DIM=${EMBED_DIM:-1280}
FOLDS=${FOLDS:-5}
EXP=${EXP:-hag_mil}
PYTHON=${PYTHON:-.venv/bin/python}
