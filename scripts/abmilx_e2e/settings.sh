# Names shared by the end-to-end ABMILX recipes. Override any of them in the environment:
#   SLIDES=/data/slides LABELS=/data/labels.csv LABEL_DICT=normal:0,tumor:1 bash scripts/abmilx_e2e/1_prepare.sh
# The defaults are the cohort that `make demo` builds.
export OUT=${OUT:-demo/abmilx_e2e}         # results of all steps; the rest as in scripts/clam/settings.sh
export EXP=${EXP:-abmilx_e2e}
LOW_MPP=${LOW_MPP:-1.0}                    # um per px of the patches of low magnification
HIGH_MPP=${HIGH_MPP:-0.5}                  # of the finer ones, which are evaluated
PATCH=${PATCH:-256}                        # side of a patch, px of its scale
SEEN_PX=${SEEN_PX:-128}                    # the same as the encoder sees it
source scripts/clam/settings.sh
PATCHES="$OUT/patches_$HIGH_MPP/patches.lmdb"
PATCHES_LOW="$OUT/patches_$LOW_MPP/patches.lmdb"
