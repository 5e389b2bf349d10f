#!/bin/bash
# Trains a recipe on 2 nodes of 8 GPUs under Slurm:
#
#   sbatch examples/launch_slurm.sh examples/qwen3_30b_a3b_math.yaml [key.sub=value ...]
#
# It starts the trainer's ranks only. The rollout servers run already, each in SGLang's own environment, on the nodes
# that rollout.endpoints names, for example:
#
#   python -m sglang.launch_server --model-path models/Qwen3-30B-A3B-Base --tp 4 --host 0.0.0.0 --port 30000
#
# nodes x GPUs must be tensor_parallel_size * pipeline_parallel_size * data_parallel_size. After an interruption
# submit the same line again: the run continues from the latest checkpoint in run_dir.

#SBATCH --job-name=megatron-drpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive

set -euo pipefail

recipe=${1:?give a recipe, for example examples/qwen3_30b_a3b_math.yaml}
shift
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Megatron overlaps communication of tensor and sequence parallelism only with one hardware queue.
export CUDA_DEVICE_MAX_CONNECTIONS=1
export OMP_NUM_THREADS=8

# One torchrun per node, which starts a rank per GPU.
srun --kill-on-bad-exit=1 .venv/bin/torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node=8 \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$first_node:29500" \
    --rdzv-id="$SLURM_JOB_ID" \
    -m megatron_drpo.train "config=$recipe" "weight_sync.host=$first_node" "$@"
