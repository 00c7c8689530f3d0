# What every job script of this folder does; sourced by them, not submitted by itself. Words of the sbatch command line are passed on:
#   sbatch slurm/pact_70b.sh trainer.steps=50                 any setting of pact_nemo/config/schema.py
#   bash slurm/pact_70b.sh --dry-run trainer.steps=50         print the resources and the exact command; submits and starts nothing
# All variables that it reads are in docs/cluster/slurm.md, "Variables". The script that sources this sets REPOSITORY and the defaults of
# RECIPE, SETTINGS and RANKS_PER_NODE.
set -euo pipefail
cd "$REPOSITORY"
REPOSITORY="$PWD" # whole, for PYTHONPATH and mounts
export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}" # also in a container, where nothing of this checkout is installed
DRY_RUN=
if [ "${1:-}" = --dry-run ]; then DRY_RUN=1; shift; fi
JOB="${SLURM_JOB_ID:-JOBID}"
ATTEMPT="${SLURM_RESTART_COUNT:-0}"
RUN_ROOT="${RUN_ROOT:-runs/slurm-$JOB}"
PYTHON="${PYTHON:-$([ -n "${CONTAINER:-}" ] && echo python3 || echo .venv/bin/python)}" # an image has an environment of its own
LOGS="$RUN_ROOT/logs/job-$JOB" # another job in the same RUN_ROOT has its own logs, server addresses and count of attempts

# srun doesn't take --cpus-per-task over from sbatch
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"
fi
ulimit -n "$(ulimit -Hn)" # srun hands it on: a socket for every episode, file and rank
# a node's address, not its name: several slurmd may share one host. Asked here, for a container has no scontrol
address() {
    local found
    found="$(scontrol show node "$1" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)" && [ -n "$found" ] || {
        echo "scontrol show node $1 names no NodeAddr; the ranks can't find each other without it" >&2
        return 1
    }
    echo "$found"
}
hosts=()
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    hosts=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
    MASTER_ADDR="$(address "${hosts[0]}")"
    export MASTER_ADDR MASTER_PORT="$((20000 + JOB % 20000))"
fi
RUN="$RUN_ROOT/latest" served=($SETTINGS "$@")
if [ -n "${RESUME:-}" ]; then
    RUN="$RESUME"
    [ -e "$RUN/config.yaml" ] || { echo "RESUME=$RESUME: no config.yaml there; give a run folder such as runs/slurm-7/latest" >&2; exit 2; }
    words=(--resume "$RUN" "$@") served=(--config "$RUN/config.yaml" rollout.server.url=null "$@")
elif [ -e "$RUN/config.yaml" ]; then
    owner="$(cat "$RUN_ROOT/job-id" 2>/dev/null || true)"
    if [ "$owner" != "$JOB" ]; then
        echo "RUN_ROOT=$RUN_ROOT has the run of ${owner:+job }${owner:-something else}, and this is job $JOB: its own model, recipe and settings" \
            "would be dropped for that run's. For a new run give another RUN_ROOT; to go on with that one, RESUME=$RUN" >&2
        exit 2
    fi
    words=(--resume "$RUN")
else
    words=($SETTINGS "run.root=$RUN_ROOT" "$@")
fi
# --wait: a rank that fails takes the others with it after a minute; ranks that leave together (exit code 75) are not cut short
NODES="${SLURM_JOB_NUM_NODES:-$(grep -o '^#SBATCH --nodes=[0-9]*' "$0" | cut -d= -f2)}"
SERVER_NODES="${SERVER_NODES:-0}"
TRAINER_NODES="$((NODES - SERVER_NODES))"
container=()
if [ -n "${CONTAINER:-}" ]; then
    container=(--container-image="$CONTAINER" --container-mounts="$REPOSITORY:$REPOSITORY${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}" --container-workdir="$REPOSITORY")
fi
[ -z "$DRY_RUN" ] || [ "${#hosts[@]}" != 0 ] || hosts=($(seq -f 'node%g' 1 "$NODES"))
placed=()
if [ "$SERVER_NODES" -gt 0 ]; then
    placed=(--nodelist="$(IFS=,; echo "${hosts[*]:0:$TRAINER_NODES}")")
    [ -n "${PACT_ROLLOUT_API_KEY:-}" ] || export PACT_ROLLOUT_API_KEY="$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')"
fi
bind=(--cpu-bind="${CPU_BIND:-none}")
# sets serve: the command of the server number $1 on node $2, whose address is $3. It serves the model as it came; a resumed trainer loads its
# own weights into it before it asks for anything
serve_on() {
    local name="$LOGS/attempt-$ATTEMPT-server-$1"
    serve=(srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$2" "${bind[@]}" --output="$name.log")
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || serve+=(--cpus-per-task="$((SLURM_CPUS_PER_TASK * RANKS_PER_NODE))") # the node is the server's alone
    serve+=("${container[@]}" "$PYTHON" tools/serve.py --script "$RECIPE" --host 0.0.0.0 --address "$3" --ready "$name.url" --log "$name.vllm"
        "${served[@]}" ${SERVER_SETTINGS:-})
}
launch=(srun --nodes="$TRAINER_NODES" --ntasks="$((TRAINER_NODES * RANKS_PER_NODE))" --ntasks-per-node="$RANKS_PER_NODE" "${placed[@]}" "${bind[@]}"
    --wait=60 --output="$LOGS/attempt-$ATTEMPT-rank-%t.log" "${container[@]}" bash -c
    'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE='"$RANKS_PER_NODE"'; exec "$@"'
    rank "$PYTHON" "$RECIPE" "${words[@]}")
# whether the nodes that are left for trainers hold the layout: asked before anything starts, where the environment is
check=("$PYTHON" "$RECIPE" --check-nodes "$NODES" "$SERVER_NODES" "$RANKS_PER_NODE" "${words[@]}")

if [ -n "$DRY_RUN" ]; then
    grep '^#SBATCH' "$0"
    for variable in SBATCH_ACCOUNT SBATCH_PARTITION; do [ -z "${!variable:-}" ] || echo "# $variable=${!variable}"; done
    echo "# in $REPOSITORY, attempt $ATTEMPT, logs in $LOGS"
    for ((index = 0; index < SERVER_NODES; index++)); do
        serve_on "$index" "${hosts[TRAINER_NODES + index]:-?}" "ADDRESS"
        printf '%q ' "${serve[@]}"
        echo "&"
    done
    printf '%q ' "${launch[@]}"
    [ "$SERVER_NODES" = 0 ] || printf 'rollout.server.url=...'
    echo
    if [ -n "${CONTAINER:-}" ] || ! command -v "$PYTHON" > /dev/null; then
        echo "# not checked here, but by the job before it starts anything: whether the layout fits the nodes"
        exit 0
    fi
    "${check[@]}" --dry-run
    exit
fi

if [ "${#hosts[@]}" != "$NODES" ]; then echo "scontrol names ${#hosts[@]} of the job's $NODES nodes ($SLURM_JOB_NODELIST)" >&2; exit 1; fi
mkdir -p "$LOGS"
echo "$JOB" > "$RUN_ROOT/job-id"
echo "$(date -Is) job $JOB attempt $ATTEMPT on $SLURM_JOB_NODELIST: ${words[*]}"
srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="${hosts[0]}" "${bind[@]}" "${container[@]}" "${check[@]}"
if [ "$SERVER_NODES" -gt 0 ]; then
    servers=()
    rm -f "$LOGS/attempt-$ATTEMPT-server-"*.url # an address is a sign that the server answers: none may be of before
    trap 'kill "${servers[@]}" 2>/dev/null || true' EXIT
    for ((index = 0; index < SERVER_NODES; index++)); do
        host="${hosts[TRAINER_NODES + index]}"
        at="$(address "$host")"
        serve_on "$index" "$host" "$at"
        "${serve[@]}" &
        servers+=($!)
    done
    until [ "$(ls "$LOGS/attempt-$ATTEMPT-server-"*.url 2>/dev/null | wc -l)" = "$SERVER_NODES" ]; do
        for step in "${servers[@]}"; do
            kill -0 "$step" 2>/dev/null || { echo "a rollout server did not start; see $LOGS/attempt-$ATTEMPT-server-*"; exit 1; }
        done
        sleep 1
    done
    launch+=("rollout.server.url=$(cat "$LOGS/attempt-$ATTEMPT-server-"*.url | paste -sd,)")
fi
newest() { ls "$RUN/checkpoints" 2>/dev/null | grep '^step_' | sort | tail -n 1; }
before="$(newest || true)"
code=0
"${launch[@]}" || code=$?
echo "$(date -Is) job $JOB attempt $ATTEMPT ended with $code"
why=
if [ "$code" = 75 ]; then
    why="stopped by a signal with a checkpoint"
elif [ "$code" -ge 128 ] || [ "$code" = 76 ]; then  # a rank was killed (its node died, or it ran out of memory), or it hung
    if [ "$(newest || true)" = "$before" ]; then echo "$ATTEMPT" >> "$LOGS/attempts-without-progress"; fi
    lost="$( (cat "$LOGS/attempts-without-progress" 2>/dev/null || true) | wc -l)"
    if [ "$lost" -lt 3 ]; then why="a rank was killed or hung ($lost attempts without a new checkpoint so far)"; fi
fi
if [ -n "$why" ] && [ "$ATTEMPT" -lt "${MAX_REQUEUES:-20}" ]; then
    echo "requeued: $why"
    scontrol requeue "$JOB"
    exit 0
fi
exit "$code"
