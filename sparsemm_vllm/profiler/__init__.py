"""Head profiles, measured in vLLM itself: which heads look at the words that the model says.

    profile = profile_model("llava-hf/llava-1.5-7b-hf", load_samples("ocr", 400, seed=0))
    save_profile(profile, "profile.json")

Without a GPU, call `sparsemm_vllm.use_cpu()` first if vllm is imported before.
"""

from .errors import ProfilerError
from .modes import MODES
from .run import profile_model

__all__ = ["MODES", "ProfilerError", "profile_model"]
