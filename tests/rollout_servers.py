"""A real vLLM server of a model, for tests that look at one server rather than at a run."""

from nemo_paced.config import RolloutConfig
from nemo_paced.serving.engine import Served
from nemo_paced.serving.sidecar import Sidecar, free_ports

KEY = "a-key-of-this-test"


def make_sidecar(model_dir, folder, *, max_model_len=64):
    """Not started yet; its log is ``folder/sidecar.log``."""
    served = Served(
        model_dir,
        RolloutConfig(),
        host="127.0.0.1",
        port=free_ports("127.0.0.1", 1)[0],
        max_model_len=max_model_len,
        dtype="float32",
        api_key=KEY,
    )
    return Sidecar(served, folder / "sidecar.log")
