# Names shared by the streaming recipes. Override any of them in the environment:
#   SLIDES=/data/slides LABELS=/data/labels.csv LABEL_DICT=normal:0,tumor:1 bash scripts/streaming/1_prepare.sh
# The defaults are the cohort that `make demo` builds, and small images for a CPU.
export OUT=${OUT:-demo/streaming}          # results of all steps; the rest as in scripts/clam/settings.sh
export EXP=${EXP:-streaming}
IMAGE_MPP=${IMAGE_MPP:-2.0}                # um per px of the images; published: 4, 2, 1
IMAGE_SIZE=${IMAGE_SIZE:-0}                # side of the square seen of each, px, 0 = all; published: 4096, 8192, 16384
NETWORK=${NETWORK:-efficientnet_lite0}     # its weights come with the installation; published: resnet34
source scripts/clam/settings.sh
IMAGES="$OUT/images/slide_images"
