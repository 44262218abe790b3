"""Public models of the recipes by their config.json: shapes, no weights."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"


def _paths(student: str, teacher: str = "") -> list[str]:
    found = [f"student.hf_path={MODELS / student}"]
    return [*found, f"teacher.hf_path={MODELS / teacher}"] if teacher else found


# overrides that name a recipe's models here
OF_RECIPE = {
    "qwen3_1.7b_from_8b_2n8g_tp4": _paths("Qwen3-1.7B", "Qwen3-8B"),
    "qwen3_1.7b_from_30b_a3b_2n8g_tp4_ep8": _paths("Qwen3-1.7B", "Qwen3-30B-A3B"),
    "qwen2.5_math_7b_self_1n8g_tp4": _paths("Qwen2.5-Math-7B-Instruct"),
    "llama3.1_8b_from_70b_2n8g_tp8_fp8": _paths("Llama-3.1-8B-Instruct", "Llama-3.3-70B-Instruct"),
}
