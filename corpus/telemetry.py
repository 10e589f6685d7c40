"""What keeps libraries from telling their makers how they are used: variables of the environment, set where a person
has not set them."""

import os
from collections.abc import MutableMapping

TELEMETRY_OFF = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "DO_NOT_TRACK": "1",
}
"""Read by: Ray (ray/_common/usage/usage_lib.py; its head reports), vLLM (vllm/usage/usage_lib.py), huggingface_hub,
through which transformers asks (huggingface_hub/constants.py), datasets (datasets/config.py), and the last one by vLLM
and huggingface_hub beside their own. DeepSpeed, PyTorch and TensorBoard report nothing."""


def switch_telemetry_off(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets each variable that `environment` lacks. Libraries read theirs once: before they are imported."""
    for name, value in TELEMETRY_OFF.items():
        environment.setdefault(name, value)
