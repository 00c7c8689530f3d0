#!/usr/bin/env bash
# PACT on full BFCL multi-turn with a 70B policy, 8 nodes with 8 GPUs of 80 GB. Each node also carries a rollout engine, split over its GPUs.
#   sbatch slurm/pact_70b.sh model.path=/models/Llama-3.1-70B-Instruct
#   SETTINGS="--recipe qwen2p5_72b_64xh100_bf16" sbatch slurm/pact_70b.sh model.path=/models/Qwen2.5-72B-Instruct
#   sbatch --nodes=16 slurm/pact_70b.sh model.path=... policy.pipeline_parallel=8            # another layout: the rest is data parallel
#   SERVER_NODES=2 SERVER_SETTINGS="rollout.server.gpu_memory_utilization=0.9" sbatch --nodes=10 slurm/pact_70b.sh ...   # 8 train, 2 serve
#   SBATCH_ACCOUNT=A SBATCH_PARTITION=P sbatch slurm/pact_70b.sh ...                          # where the cluster wants them
#   bash slurm/pact_70b.sh --dry-run model.path=...                                         # what would be submitted; starts nothing
# The notice has to be longer than what still runs after it: the rest of a step's scoring and update, refit and a checkpoint. By the plan
# that is 504 s, and 1,033 s for qwen3_32b_16xh100_bf16, the longest of the recipes of several nodes; it may be 26 % off.
# A job whose --time is not longer than the notice by several steps is told at its start: give it a --signal of its own.
#SBATCH --job-name=pact-70b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@1500
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
RECIPE="${RECIPE:-recipes/pact_70b.py}"
SETTINGS="${SETTINGS:---recipe llama3p1_70b_64xh100_bf16}"
RANKS_PER_NODE="${RANKS_PER_NODE:-8}"
REPOSITORY="${PACT_REPOSITORY:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}" # Slurm runs a copy of this script elsewhere
if [ ! -e "$REPOSITORY/slurm/job.sh" ]; then
    echo "no slurm/job.sh in $REPOSITORY: submit in the checkout's folder, or say where it is, PACT_REPOSITORY=FOLDER sbatch ..." >&2
    exit 2
fi
source "$REPOSITORY/slurm/job.sh"
