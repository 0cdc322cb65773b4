"""The `DeepSpeed` logger: one line per event, warnings and above unless a script asks for more."""
import logging
import os
import sys

logger = logging.getLogger("DeepSpeed")
if not logger.handlers:
    handler = logging.StreamHandler(sys.stderr)  # stdout stays the script's own
    handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False


def log_dist(message, ranks=None, level=logging.INFO):
    """Logs `message` on the given global ranks (None or [-1]: on all), with the rank in front."""
    rank = int(os.environ.get("RANK", 0))
    if not ranks or -1 in ranks or rank in ranks:
        logger.log(level, "[Rank %d] %s", rank, message)
