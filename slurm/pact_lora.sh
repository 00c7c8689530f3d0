#!/usr/bin/env bash
# PACT on full BFCL multi-turn with low-rank adapters, one node: a 70B policy on 8 GPUs of 80 GB, split over them like its rollout engine.
#   sbatch slurm/pact_lora.sh model.path=/models/Llama-3.1-70B-Instruct
#   SETTINGS="--recipe qwen3_32b_8xh100_lora" sbatch slurm/pact_lora.sh model.path=/models/Qwen3-32B
#   SETTINGS="--recipe qwen3_4b_1xh100_lora" RANKS_PER_NODE=1 sbatch --ntasks-per-node=1 --gpus-per-node=1 --signal=TERM@2700 slurm/pact_bfcl.sh model.path=/models/Qwen3-4B
#   sbatch slurm/pact_lora.sh model.path=... policy.lora.rank=64 policy.lora.alpha=128      # any setting; a rank that TP = 8 divides
#   bash slurm/pact_lora.sh --dry-run model.path=...                                        # what would be submitted; starts nothing
# The notice has to be longer than what still runs after it: the rest of a step's scoring and update, refit and a checkpoint. By the plan that is 3,307 s and may be 26 % off.
# A job whose --time is not longer than the notice by several steps is told at its start: give it a --signal of its own.
#SBATCH --job-name=pact-lora
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@4500
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
RECIPE="${RECIPE:-recipes/pact_70b.py}"
SETTINGS="${SETTINGS:---recipe llama3p1_70b_8xh100_lora_bf16}"
RANKS_PER_NODE="${RANKS_PER_NODE:-8}"
REPOSITORY="${PACT_REPOSITORY:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}" # Slurm runs a copy of this script elsewhere
if [ ! -e "$REPOSITORY/slurm/job.sh" ]; then
    echo "no slurm/job.sh in $REPOSITORY: submit in the checkout's folder, or say where it is, PACT_REPOSITORY=FOLDER sbatch ..." >&2
    exit 2
fi
source "$REPOSITORY/slurm/job.sh"
