"""A real vLLM server of a model, for tests that look at one server rather than at a run."""

from nemo_paced.config import RolloutConfig
from nemo_paced.serving.sidecar import Sidecar, free_ports

KEY = "a-key-of-this-test"


def make_sidecar(model_dir, folder, *, max_model_len=64):
    """Not started yet; its log is ``folder/sidecar.log``."""
    return Sidecar(
        model_dir,
        RolloutConfig(),
        max_model_len=max_model_len,
        dtype="float32",
        log_path=folder / "sidecar.log",
        port=free_ports("127.0.0.1", 1)[0],
        api_key=KEY,
    )
