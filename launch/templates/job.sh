# ---- the same for every job ---------------------------------------------------------------------------------------
# shellcheck shell=bash disable=SC2154
# Exit codes do not survive --kill-on-bad-exit, so that ranks write how they ended into status.json in this attempt's log
# folder; the run folder's own status.json may be another launch's.
set -uo pipefail

run_dir=${run_dirs[${SLURM_ARRAY_TASK_ID:-0}]}
config=$job_folder/config.${SLURM_ARRAY_TASK_ID:-0}.yaml
attempt=${SLURM_RESTART_COUNT:-0}
logs=$run_dir/logs/$SLURM_JOB_ID.$attempt
status=$logs/status.json
# of this submission, whose jobs and attempts share one folder
attempts=$job_folder/attempts.${SLURM_ARRAY_TASK_ID:-0}
gave_up=$job_folder/gave_up.${SLURM_ARRAY_TASK_ID:-0}
bad_nodes=$job_folder/bad_nodes
mkdir -p "$logs" || exit 1
cd "$job_folder/code" || exit 1

say() { echo "[$(date +%FT%T)] job $SLURM_JOB_ID attempt $attempt: $*"; }

value_of() { # $1: key, whose value is a text or a number; $2: a status.json
    sed -n -e "s/.*\"$1\": *\"\([^\"]*\)\".*/\1/p" -e "s/.*\"$1\": *\([0-9]*\)[,}].*/\1/p" "$2" 2>/dev/null | head -n 1
}

if [ "$chained" = 1 ] && [ "$run_dir/status.json" -nt "$job_folder/job.sh" ] &&
    [ "$(value_of status "$run_dir/status.json")" = finished ]; then
    say "an earlier job of the chain has finished the run"
    exit 0
fi
if [ "$chained" = 1 ] && [ -e "$gave_up" ]; then
    say "an earlier job of the chain gave up: $(cat "$gave_up")"
    exit 1
fi

# the first node by name where names resolve, else by its address
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if ! getent hosts "$MASTER_ADDR" >/dev/null; then
    MASTER_ADDR=$(srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$MASTER_ADDR" hostname --ip-address | cut -d ' ' -f 1)
fi
# another port for every job and attempt: the last attempt's may still be in TIME_WAIT
MASTER_PORT=$((first_port + (SLURM_JOB_ID * ports_a_job + attempt) % num_ports))
export MASTER_ADDR MASTER_PORT PYTHONPATH="$job_folder/code" PYTHONUNBUFFERED=1
export BD3_ATTEMPT=$attempt BD3_LOGS=$logs
if [ "$exclude_bad" = 1 ]; then
    export BD3_BAD_NODES=$bad_nodes
fi
# signals come when SLURM looks at its clock, up to 60 s early; the ranks look at theirs every step
limit=$(squeue --noheader --job "$SLURM_JOB_ID" --format %e 2>/dev/null | head -n 1)
# without a limit there is no date; an empty one would mean midnight
if limit=$(date -d "${limit:-none}" +%s 2>/dev/null); then
    export BD3_DEADLINE=$((limit - signal_lead_seconds))
fi

command=(${wrapper[@]+"${wrapper[@]}"} "$python")
if [ "$launcher" = torchrun ]; then
    # USR1 would end torchrun's agent; --signals-to-handle passes it on
    command+=(-m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "$ranks_per_node"
        --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$SLURM_JOB_ID.$attempt"
        --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout 60 --max-restarts 0)
    tasks=$SLURM_NNODES per_node=1
else
    tasks=$((SLURM_NNODES * ranks_per_node)) per_node=$ranks_per_node
fi
command+=(-m bd3_megatron.cli train "$config")

say "starts on $SLURM_JOB_NODELIST, $launcher, $MASTER_ADDR:$MASTER_PORT, logs in $logs"
srun --nodes="$SLURM_NNODES" --ntasks="$tasks" --ntasks-per-node="$per_node" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    --kill-on-bad-exit=1 --output="$logs/rank-%t.log" ${srun_options[@]+"${srun_options[@]}"} "${command[@]}" &
step=$!
# rank 0 also to the main log
tail --pid="$step" -n +1 -F "$logs/rank-0.log" 2>/dev/null &
mirror=$!

stopped_by=
# shellcheck disable=SC2317 # called by the traps below
near_limit() {
    stopped_by=USR1
    say "near the time limit: ranks are told to save and stop"
    kill -s USR1 "$step" 2>/dev/null
}
# shellcheck disable=SC2317
cancelled() {
    # SLURM has told the ranks already; a second TERM through srun would end them before they have saved
    stopped_by=TERM
    say "cancelled or preempted: ranks save and stop"
}
trap near_limit USR1
trap cancelled TERM

# bash runs a trap only between commands, and the trap ends the wait: so wait again until srun is really gone
while :; do
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
done
# a signal may have ended the last wait although srun had ended too; bash still knows srun's own code
wait "$step"
code=$?
wait "$mirror"

state=$(value_of status "$status")
at_step=$(value_of step "$status")
reason=$(value_of reason "$status")
say "srun ended with $code; run is ${state:-without status} at step ${at_step:-unknown}${reason:+ ($reason)}"
if [ "$state" = finished ]; then
    rm -f "$attempts"
    exit 0
fi

give_up() { # $1: why
    say "gives up: $1; see $logs"
    echo "$1" >"$gave_up.new" && mv "$gave_up.new" "$gave_up"
    exit 1
}

takes_files() { # $1: a folder
    # flushed, because a network file system may tell only then that the disk is full
    dd if=/dev/zero of="$1/.probe" bs=64K count=16 conv=fsync status=none 2>/dev/null
    local code=$?
    rm -f "$1/.probe"
    return "$code"
}

requeue() {
    if [ "$chained" = 1 ]; then
        say "the next job of the chain continues"
        exit "$1"
    fi
    # SLURM ends this script with TERM before the next line runs
    trap '' TERM
    say "requeues itself"
    # the controller may be restarting
    for _ in $(seq 30); do
        scontrol requeue "$SLURM_JOB_ID" && break
        sleep 10
    done
    if [ "$exclude_bad" = 1 ] && [ -s "$bad_nodes" ]; then
        # a running job cannot exclude nodes for itself; one that waits in the queue can
        scontrol update jobid="$SLURM_JOB_ID" ExcNodeList="$({ echo "$excluded"; cat "$bad_nodes"; } | sed '/^$/d' | sort -u | paste -sd ,)"
    fi
    exit "$1"
}

if [ "$stopped_by" = TERM ]; then
    # scancel, or a preemption after which SLURM itself requeues
    exit "$code"
fi
if [ "$state" = stopped ] && [ "$reason" = file ]; then
    say "stops because train.stop_file asked for it; submit again to continue"
    exit 0
fi
# written after the checkpoint is whole; torchrun returns 1 after every signal, so the code says nothing
if [ "$state" = stopped ]; then
    requeue 0
fi

# ranks that failed say with which code they meant to end; without their report srun's own is the best there is
failed_with=$code
if [ "$state" = failed ]; then
    failed_with=$(value_of exit_code "$status")
fi
for final in $final_codes; do
    if [ "$failed_with" = "$final" ]; then
        give_up "${reason:-exit code $final, which another attempt would not change}"
    fi
done

# ranks cannot report on a full disk, and the count of attempts below could not be kept there either
for folder in "$run_dir" "$job_folder"; do
    takes_files "$folder" || give_up "$folder takes no more files (full, over quota or read-only); free space and submit again"
done

# attempts without progress: "<newest checkpoint after the last failed attempt> <failures there>"
progress=$(cat "$run_dir/checkpoints/LATEST" 2>/dev/null || echo none)
progress=${progress//[[:space:]]/_}
last_progress=- failures=0
if [ -r "$attempts" ]; then
    read -r last_progress failures <"$attempts"
fi
if [ "$progress" = "$last_progress" ]; then
    failures=$((failures + 1))
else
    failures=1
fi
echo "$progress $failures" >"$attempts.new" && mv "$attempts.new" "$attempts"
if [ "$failures" -ge "$max_attempts" ]; then
    give_up "$failures attempts in a row failed without a new checkpoint (newest: $progress)"
fi
requeue 1
