"""Starting from what mpirun tells its processes: its variables become RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT, which everything else reads. MPI itself is not used.

Decides: which variables count, and where rank 0 is. Invariant: where an error is raised the environment is as it was.
"""
import os
from collections import namedtuple

from .utils.logging import logger

# Names that one kind of mpirun gives: rank, number of ranks, rank on the machine, number of ranks there.
Names = namedtuple("Names", "rank size local_rank local_size")
KINDS = (
    Names("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    Names("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
AML_PORT_ONE_NODE, AML_PORT = 54965, 6105


def job():
    """The Names that this process's environment has, or None where no mpirun started it."""
    return next((names for names in KINDS if os.environ.get(names.rank) and os.environ.get(names.size)), None)


def started_by_mpi():
    """Whether mpirun started several ranks, this one among them."""
    names = job()
    return names is not None and _number(names.size) > 1


def _number(name):
    text = os.environ[name]
    if not text.isdigit():
        raise ValueError(f"the environment variable {name} is {text!r}; a number from 0 is expected")
    return int(text)


def _ranks(names):
    """{RANK, WORLD_SIZE, LOCAL_RANK}: text; without the last where nobody tells it."""
    found = {"RANK": _number(names.rank), "WORLD_SIZE": _number(names.size)}
    if found["RANK"] >= found["WORLD_SIZE"]:
        raise ValueError(f"{names.rank} is {found['RANK']}, {names.size} is {found['WORLD_SIZE']}; a rank below the "
                         "size is expected")
    if os.environ.get(names.local_rank):
        found["LOCAL_RANK"] = _number(names.local_rank)
    return {name: str(value) for name, value in found.items()}


def _on_one_machine(names, n_ranks):
    return n_ranks == "1" or os.environ.get(names.local_size) == n_ranks


def discover(distributed_port=29500, verbose=True):
    """Exports RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from Open MPI's, MVAPICH's, MPICH's or Intel
    MPI's variables. MASTER_ADDR: as it is set, else 127.0.0.1 where all ranks are on this machine.

    RuntimeError where no mpirun started this process, ValueError for wrong or missing variables.
    """
    names = job()
    if names is None:
        asked = " or ".join(f"{kind.rank} and {kind.size}" for kind in KINDS)
        raise RuntimeError(f"mpi_discovery: this process was not started by mpirun: {asked} would be set")
    found = _ranks(names)
    if not os.environ.get("MASTER_ADDR"):
        if not _on_one_machine(names, found["WORLD_SIZE"]):
            raise ValueError(f"mpi_discovery: MASTER_ADDR is not set, and {names.local_size} does not say that all "
                             f"{found['WORLD_SIZE']} ranks are on this machine; export rank 0's address to all ranks "
                             "(mpirun -x MASTER_ADDR=..., or -genv MASTER_ADDR ...)")
        found["MASTER_ADDR"] = "127.0.0.1"
    if not os.environ.get("MASTER_PORT"):
        found["MASTER_PORT"] = str(distributed_port)
    _export(found, "MPI", verbose)


def _export(found, source, verbose):
    os.environ.update(found)
    if verbose and os.environ["RANK"] == "0":
        logger.info("from %s: %s", source, ", ".join(f"{name}={value}" for name, value in found.items()))


def in_aml():
    """Whether this is a job of Azure Machine Learning."""
    return "AZUREML_EXPERIMENT_ID" in os.environ


def in_aws_sm():
    """Whether this is a job of Amazon SageMaker."""
    return "SM_TRAINING_ENV" in os.environ


def in_dlts():
    """Whether this is a job of a DLTS cluster."""
    return "DLTS_JOB_ID" in os.environ


def _of_open_mpi(where):
    names = KINDS[0]
    missing = [name for name in (names.rank, names.size, names.local_rank) if not os.environ.get(name)]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing in the environment")
    return names


def patch_aml(master_port=AML_PORT, verbose=True):
    """Exports what a job of Azure Machine Learning tells: ranks as Open MPI's, MASTER_ADDR and MASTER_PORT by Azure's
    variables, and NCCL_SOCKET_IFNAME. master_port: where there are several machines and MASTER_PORT is not set."""
    names = _of_open_mpi("Azure Machine Learning")
    found = _ranks(names)
    one_node = os.environ.get(names.local_size) == found["WORLD_SIZE"]
    source = "AZ_BATCHAI_MPI_MASTER_NODE" if one_node else "AZ_BATCH_MASTER_NODE"
    if not os.environ.get(source):
        raise ValueError(f"Azure Machine Learning: {source} missing in the environment")
    found["MASTER_ADDR"] = os.environ[source].partition(":")[0]
    if one_node:
        found["MASTER_PORT"] = str(AML_PORT_ONE_NODE)
    elif not os.environ.get("MASTER_PORT"):
        found["MASTER_PORT"] = str(master_port)
    _export({**found, "NCCL_SOCKET_IFNAME": "^docker0,lo"}, "Azure Machine Learning", verbose)


def patch_aws_sm(verbose=True):
    """Exports the ranks of a job of Amazon SageMaker, which are Open MPI's; MASTER_ADDR and MASTER_PORT are its own."""
    _export(_ranks(_of_open_mpi("Amazon SageMaker")), "Amazon SageMaker", verbose)


def take_over(distributed_port, verbose):
    """For a process whose RANK or WORLD_SIZE nobody has set: whoever started it tells. Nothing where nobody did."""
    if in_aml() and not in_dlts():
        patch_aml(verbose=verbose)
    elif in_aws_sm():
        patch_aws_sm(verbose=verbose)
    elif job() is not None:
        discover(distributed_port, verbose)
