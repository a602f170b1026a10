# Names shared by the ABMILX recipes. Override any of them in the environment:
#   SLIDES=/data/slides LABELS=/data/labels.csv LABEL_DICT=normal:0,tumor:1 bash scripts/abmilx/1_prepare.sh
# The defaults are the cohort that `make demo` builds.
export OUT=${OUT:-demo/abmilx}           # results of all steps; the rest as in scripts/clam/settings.sh
export EXP=${EXP:-abmilx}
source scripts/clam/settings.sh
