# Names shared by the end-to-end ABMILX recipes. Override any of them in the environment:
#   SLIDES=/data/slides LABELS=/data/labels.csv LABEL_DICT=normal:0,tumor:1 bash scripts/abmilx_e2e/1_prepare.sh
# The defaults are the cohort that `make demo` builds.
export OUT=${OUT:-demo/abmilx_e2e}         # results of all steps; the rest as in scripts/clam/settings.sh
export EXP=${EXP:-abmilx_e2e}
MODEL=${MODEL:-e2e_efficientnet_lite0_abmilx}
LOW_MPP=${LOW_MPP:-1.0}                    # um per px of the patches of low magnification
HIGH_MPP=${HIGH_MPP:-0.5}                  # of the finer ones that tile them, which are evaluated
PATCH=${PATCH:-256}                        # side of a patch, px of its scale
# glibc would give large blocks back at once and take them anew, a third of the time on a CPU
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296
source scripts/clam/settings.sh
PATCHES="$OUT/patches/patches.lmdb#mpp_$HIGH_MPP"
PATCHES_LOW="$OUT/patches/patches.lmdb"
