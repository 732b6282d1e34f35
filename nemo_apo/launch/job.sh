logs=$launch/$SLURM_JOB_ID
state=$launch/state${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}
start=${SLURM_RESTART_COUNT:-0}
stopping=false
step=

say() {
    echo "$(date +%FT%T) job $SLURM_JOB_ID, start $start: $*"
}

# Ends the launch for good: later starts and jobs of the chain end with the same status.
end_launch() {
    echo "$1" >"$state/ended"
    say "$2"
    exit "$1"
}

# Whether Slurm has nothing else in mind with this job.
is_running() {
    [[ $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]
}

# Ends this start; the next one goes on from the newest checkpoint.
go_on_later() {
    say "$1"
    if ((chain > 1)); then
        say "the next job of the chain goes on"
    elif [[ $requeue == false ]]; then
        say "cluster.requeue=false: run.if_exists=resume goes on"
    elif ! is_running; then
        say "Slurm ends the job"
    else
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit 75
}

# Slurm sends USR1 to this script alone; srun passes it on to the tasks that it knows to run. The file
# is for those that are still being started, and some seconds count as one signal.
# shellcheck disable=SC2317,SC2329
on_usr1() {
    local try
    stopping=true
    say "USR1: stopping early"
    touch "$NEMO_APO_STOP_FILE"
    for try in 1 2 3; do
        if [[ -z $step ]] || ! kill -USR1 "$step" 2>/dev/null; then break; fi
        ((try == 3)) || sleep 1
    done
}

# Slurm sends TERM to the tasks itself; this script has to see how they end.
# shellcheck disable=SC2317,SC2329
on_term() {
    stopping=true
    say "TERM: stopping early"
}

# One task per node, in the background: a trap runs only while bash waits. The status is srun's,
# the highest of the tasks'. When one has ended, the others have some seconds to say why they end too.
on_every_node() {
    local name=$1 patience=$2 status index
    shift 2
    srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait="$patience" --unbuffered "${srun_options[@]}" \
        --output="$logs/start$start-$name-node%n.log" bash -c "$task" task "$env_file" "$@" &
    step=$!
    while true; do
        status=0
        wait "$step" || status=$?
        kill -0 "$step" 2>/dev/null || break
    done
    step=
    ((status == 0)) && return
    for index in "${!hosts[@]}"; do
        say "$name on ${hosts[index]} ended; the last lines of" \
            "$logs/start$start-$name-node$index.log"
        tail -n 20 "$logs/start$start-$name-node$index.log" || true
    done
    return "$status"
}

# What a node runs. Secrets come from the file here, not through Slurm.
# shellcheck disable=SC2016
task='
if [[ -n $1 ]]; then
    set -a
    source "$1" || exit 2
    set +a
fi
shift
exec "$@"
'

# The last whole checkpoint by its name, none where there is none.
newest_checkpoint() {
    local found
    found=$(find "$run_folder/checkpoints" -maxdepth 1 -name 'step_*' 2>/dev/null | sort -V)
    basename "${found##*$'\n'}" | grep . || echo none
}

# Ends the launch after too many starts in a row that found no checkpoint newer than the one before.
count_stalled_starts() {
    local before='' stalled=0
    [[ ! -f $state/progress ]] || read -r before stalled <"$state/progress"
    if [[ $newest == "$before" ]]; then stalled=$((stalled + 1)); else stalled=0; fi
    echo "$newest $stalled" >"$state/progress"
    ((stalled < stalled_starts)) || end_launch 76 \
        "$stalled starts in a row ended without a new checkpoint (newest: $newest); not tried again"
}

# Ends a start whose tasks failed. Where a node is gone, the others notice it long before Slurm does,
# which requeues the job only then.
fail() {
    local status=$1 what=$2 host lost=()
    for host in "${hosts[@]}"; do
        is_running || break
        timeout -k 5 20 srun --nodes=1 --ntasks=1 --nodelist="$host" true || lost+=("$host")
    done
    if ((${#lost[@]} > 0)) && is_running; then
        say "${lost[*]} does not answer; waiting for Slurm to find that out (at most 15 minutes);" \
            "cluster.extra_sbatch=['--exclude=NODE'] leaves a node out"
        sleep 900 &
        wait "$!" || true
    fi
    if is_running; then say "$what (status $status)"; else say "Slurm ends the job"; fi
    exit "$status"
}

mkdir -p "$logs" "$state"
export NEMO_APO_STOP_FILE=$state/stop
rm -f "$NEMO_APO_STOP_FILE"
trap on_usr1 USR1
trap on_term TERM
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${master_addr:-${hosts[0]}}
export NEMO_APO_NODES="${hosts[*]}"
export MASTER_PORT=$((20000 + 2 * (SLURM_JOB_ID % 20000)))
# srun gives its tasks this script's environment, of which sbatch exported nothing.
export SLURM_EXPORT_ENV=ALL
# Since 22.05 srun no longer takes this from sbatch.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
newest=$(newest_checkpoint)
say "nodes ${hosts[*]}, $ranks_per_node ranks each, run $run_folder, newest checkpoint $newest," \
    "image ${image:-none}"

if [[ -f $state/ended ]]; then
    say "the launch has ended with status $(<"$state/ended")"
    exit "$(<"$state/ended")"
fi
if [[ -f $state/started ]]; then
    if [[ $run_folder/summary.json -nt $state/started ]]; then
        end_launch 0 "the run is finished"
    fi
    # A run without a checkpoint cannot be resumed, only begun again.
    if_exists=resume
    [[ $newest != none ]] || if_exists=overwrite
    arguments+=("run.if_exists=$if_exists")
fi
count_stalled_starts

if [[ $doctor == true ]]; then
    # A port of its own: the training's store opens right after.
    on_every_node doctor 15 env MASTER_PORT=$((MASTER_PORT + 1)) "$python" -m nemo_apo doctor \
        --seconds "$doctor_seconds" --shared "$launch" "${doctor_options[@]}" || {
        status=$?
        [[ $stopping == false ]] || go_on_later "stopped before training"
        fail "$status" "a node is not fit for the run"
    }
fi
[[ $stopping == false ]] || go_on_later "stopped before training"

[[ -f $state/started ]] || touch "$state/started"
status=0
on_every_node train 120 "$python" -m nemo_apo.launch.node "$ranks_per_node" \
    train "${arguments[@]}" || status=$?
case $status in
    0) end_launch 0 "the run has ended" ;;
    2) end_launch 2 "the run was refused" ;;
    75) go_on_later "stopped early and saved" ;;
esac
[[ $stopping == false ]] || go_on_later "stopped early (status $status)"
fail "$status" "the run failed"
