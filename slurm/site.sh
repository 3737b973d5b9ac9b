# shellcheck shell=bash disable=SC2034
# This site's Slurm, one SCLDM_KEY=value a line, for `scldm submit` and slurm/job.sbatch. The file is read, not run.
# A value with blanks needs quotes. ~, $HOME and $USER are filled in. An empty value leaves the choice to Slurm.
# SCLDM_SITE=FILE in the environment names another file.

# where jobs go (those without a GPU perhaps elsewhere), and for how long (24:00:00)
SCLDM_PARTITION=
SCLDM_CPU_PARTITION=
SCLDM_ACCOUNT=
SCLDM_QOS=
SCLDM_TIME=

# a node: one rank per GPU (8, or a100:8); on nodes without GPUs, so many ranks; CPU cores of a rank; memory (0: all of a node's)
SCLDM_GPUS_PER_NODE=8
SCLDM_TASKS_PER_NODE=
SCLDM_CPUS_PER_TASK=
SCLDM_MEMORY=

# environment modules ("cuda/12.8 python/3.12"), the Python that has scldm, or a container image. With one, the job's own
# steps need a Python outside of it that has scldm: JOB_PYTHON, else that of the submitting shell
SCLDM_MODULES=
SCLDM_PYTHON=
SCLDM_JOB_PYTHON=
SCLDM_CONTAINER=
# pyxis (the default), apptainer, singularity or podman; mounts as /lustre,/data:/data:ro
SCLDM_CONTAINER_RUNTIME=
SCLDM_CONTAINER_MOUNTS=
# seconds in which a node has to have the image (1800); 0 for no limit
SCLDM_IMAGE_S=

# folder on a node's own disk for staged shards; folders that all nodes see (/lustre:/home)
SCLDM_SCRATCH=
SCLDM_SHARED=

# the network: SCLDM_NCCL_X=value sets NCCL_X on every node (also GLOO_, UCX_, FI_)
SCLDM_NCCL_SOCKET_IFNAME=
SCLDM_NCCL_IB_HCA=
