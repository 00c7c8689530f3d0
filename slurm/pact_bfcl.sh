#!/usr/bin/env bash
# PACT on full BFCL multi-turn, Qwen3-4B on one node with 4 GPUs: the paper's run.
#   sbatch slurm/pact_bfcl.sh model.path=/models/Qwen3-4B
#   SETTINGS="--config conf/pact_bfcl-smollm2_135m-cpu.yaml" RANKS_PER_NODE=1 \
#       sbatch --ntasks-per-node=1 --cpus-per-task=2 --gpus-per-node=0 --mem=16G slurm/pact_bfcl.sh                     # two CPU cores
# Half of a node of 8 GPUs is enough, so the job asks for memory instead of all of the node: the plan's 198 GiB and room for files in use.
# The notice has to be longer than what still runs after it: the rest of a step's scoring and update, refit and a checkpoint. By the plan that is 574 s and may be 26 % off.
# A job whose --time is not longer than the notice by several steps is told at its start: give it a --signal of its own.
#SBATCH --job-name=pact-bfcl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --mem=240G
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
RECIPE="${RECIPE:-recipes/pact_bfcl.py}"
SETTINGS="${SETTINGS:---recipe qwen3_4b_4xh100_bf16}"
RANKS_PER_NODE="${RANKS_PER_NODE:-4}"
REPOSITORY="${PACT_REPOSITORY:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}" # Slurm runs a copy of this script elsewhere
if [ ! -e "$REPOSITORY/slurm/job.sh" ]; then
    echo "no slurm/job.sh in $REPOSITORY: submit in the checkout's folder, or say where it is, PACT_REPOSITORY=FOLDER sbatch ..." >&2
    exit 2
fi
source "$REPOSITORY/slurm/job.sh"
