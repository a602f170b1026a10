# Names shared by the six CLAM recipes. Override any of them in the environment:
#   SLIDES=/data/slides LABELS=/data/labels.csv LABEL_DICT=normal:0,tumor:1 bash scripts/clam/1_create_patches.sh
# The defaults are the cohort that `make demo` builds.
SLIDES=${SLIDES:-demo/slides}            # folder of slides
SLIDE_EXT=${SLIDE_EXT:-.tif}
LABELS=${LABELS:-demo/cohort.csv}        # csv: case_id, slide_id, label
LABEL_DICT=${LABEL_DICT:-skin:0,colon:1} # label text to class number
OUT=${OUT:-demo/recipe}                  # results of all six steps
ENCODER=${ENCODER:-efficientnet_lite0}   # resnet50_trunc, uni_v1, conch_v1, timm:<name>
EMBED_DIM=${EMBED_DIM:-1280}             # 1024 for resnet50_trunc and uni_v1, 512 for conch_v1
FOLDS=${FOLDS:-5}
EXP=${EXP:-clam_sb}
PYTHON=${PYTHON:-.venv/bin/python}
