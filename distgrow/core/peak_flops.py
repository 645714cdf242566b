"""Peak FLOP/s of GPUs by name and precision, dense, as their makers state them; knows no torch."""

import re
from collections.abc import Mapping

#: Words of torch's name of a GPU → (bfloat16, TF32, float32) in 10¹² FLOP/s, the more particular ones first. Matrices
#: in bfloat16 and TF32 go through tensor cores, without sparsity.
TABLE: Mapping[str, tuple[float, float, float]] = {
    "H100 NVL": (835.5, 417.5, 60.0),
    "H100 PCIe": (756.5, 378.0, 51.0),
    "RTX 4090": (165.2, 82.6, 82.6),
    "H100": (989.4, 494.7, 66.9),
    "GH200": (989.4, 494.7, 66.9),
    "H200": (989.4, 494.7, 66.9),
    "B200": (2250.0, 1100.0, 75.0),
    "A100": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
    "L40": (181.0, 90.5, 90.5),
    "A10": (125.0, 62.5, 31.2),
    "A10G": (70.0, 35.0, 35.0),
    "L4": (121.0, 60.0, 30.3),
}


def peak_flops(gpu: str, precision: str, *, tf32: bool = False) -> float | None:
    """Return FLOP/s of a GPU, None if they are not known.

    Args:
        gpu: Its name, as torch.cuda.get_device_name() gives it.
        precision: That of the matrix products: float32, bfloat16 or float16.
        tf32: Whether those of float32 go by TF32.
    """
    if re.search(r"\b(MIG|Laptop)\b", gpu):  # a part of a GPU, and another one of the same name
        return None
    found = next((speeds for name, speeds in TABLE.items() if re.search(rf"\b{name}\b", gpu)), None)
    place = {"bfloat16": 0, "float16": 0, "float32": 1 if tf32 else 2}.get(precision)
    return None if found is None or place is None else 1e12 * found[place]
