"""The table of training setups, from test results.

    pytest tests --junitxml=outputs/NAME.xml                              # in each environment
    python -m benchmarks.setups.table --record outputs/NAME.xml           # -> benchmarks/results/setups/NAME.json
    python -m benchmarks.records --write                                  # the table in docs/training-setups.md

A row is "works" or "refused" (with a clear error) if every test behind it passed, "FAILS" if one did not, and "not run"
if none ran. `benchmarks.setups.gpu` adds the rows that need GPUs, as results/setups/gpu.json.
"""

from __future__ import annotations

import argparse
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from benchmarks import RESULTS, markdown
from lara_adapter.storage.files import read_json, write_json

RECORDS = RESULTS / "setups"

# what a user would look for: (row, "works" or "refused", pattern of test names)
ROWS = [
    ("gradient checkpointing, non-reentrant", "works", r"test_eager\[.*-non-reentrant|never_changes_what_was_captured"),
    ("gradient checkpointing, reentrant", "works", r"test_eager\[.*-(output|norm)-reentrant"),
    ("reentrant, no input requires grad", "refused", r"without_an_input_that_requires_grad"),
    ("torch.compile, fullgraph", "works", r"compiled_whole_fullgraph|compiled_with_frozen_lam|compiled_in_place"),
    ("torch.compile with checkpointing", "works", r"compiled_with_checkpointing"),
    ("torch.compile before attach_lara", "refused", r"attaching_to_a_compiled_policy"),
    ("blocks compiled, not yet run, then attach_lara", "works", r"blocks_compiled_before_attaching_but_not_run"),
    ("DDP, every flag, static_graph", "works", r"test_ddp_gradients"),
    ("DDP, a rank without a valid pair", "works", r"rank_without_a_valid_pair"),
    ("DDP, no_sync accumulation", "works", r"no_sync_accumulation"),
    ("codebook equal on all ranks", "works", r"codebook_and_projector_are_equal"),
    ("contrastive negatives from all ranks", "works", r"contrastive_takes_its_negatives"),
    ("FSDP2 (fully_shard), LARA in the root or in units", "works", r"fsdp2"),
    ("nn.DataParallel", "refused", r"data_parallel_replica|real_wrappers"),
    ("Trainer: dict, ModelOutput, tuple, keywords", "works", r"every_kind_of_output|eval_loss_equals"),
    ("Trainer: gradient accumulation", "works", r"gradient_accumulation_scales"),
    ("Trainer: resume, bit-identical, also of a PeftModel", "works", r"resumed_at_step_k|each_save_holds|peft_run_resumes"),
    ("Trainer: resuming a run without LARA", "refused", r"resuming_a_(plain|lara)_run"),
    ("accelerate: prepare, accumulate, bf16, save/load_state","works",
     r"prepared_loop|accumulate_equals|bf16_loss|save_state"),
    ("accelerate: attach_lara after prepare", "refused", r"attaching_after_prepare"),
    ("peft LoRA, then attach_lara", "works", r"attach_after_lora|merge_and_unload|tap_reads_the_state_after_lora"),
    ("attach_lara, then peft LoRA", "refused", r"attach_before_lora"),
    ("torch.export, ONNX after detach", "works", r"export_after_detach|detached_copy_exports|onnx_after_detach"),
    ("torch.export, ONNX while attached", "refused", r"while_attached_is_refused"),
    ("killed in a save, full disk", "works", r"killed_in_the_middle|full_disk"),
    ("ZeRO-3: static checks", "works", r"no_parameter_of_ours|sizes_come_from|needs_no_weight_shapes"),
    ("DeepSpeed ZeRO-2, ZeRO-3 on CPU ranks", "works", r"test_zero_(takes|saves)"),
    ("DDP over NCCL, FSDP2, inductor, bf16 on GPUs", "works", r"gpu:(ddp|fsdp|inductor|bf16)"),
    ("DeepSpeed ZeRO-2, ZeRO-3 on GPUs", "works", r"gpu:zero"),
]  # fmt: skip


def write_record(path: Path) -> Path:
    """Keep of a JUnit file what the table needs: versions, and each test's "passed", "failed" or "skipped"."""
    root = ET.parse(path).getroot()
    versions = {p.get("name", ""): p.get("value", "") for p in root.iter("property")}
    results = {}
    for case in root.iter("testcase"):
        states = {child.tag for child in case}
        bad = states & {"failure", "error"}
        results[case.get("name", "")] = "failed" if bad else "skipped" if "skipped" in states else "passed"
    used = {name: state for name, state in results.items() if any(re.search(p, name) for _, _, p in ROWS)}
    target = RECORDS / f"{path.stem}.json"
    write_json(target, {"versions": versions, "results": used})
    return target


def cell(results: dict[str, str], pattern: str, kind: str) -> str:
    """One row's result in one environment."""
    states = [state for name, state in results.items() if re.search(pattern, name) and state != "skipped"]
    if not states:
        return "not run"
    return kind if set(states) == {"passed"} else "**FAILS**"


def table() -> str:
    """The table in Markdown."""
    environments = [(path.stem, read_json(path)) for path in sorted(RECORDS.glob("*.json"))]
    labels = {"python": "Python", "torch": "torch", "transformers": "transformers", "peft": "peft"}
    head = ["setup"]
    for name, record in environments:
        listed = [f"{label} {record['versions'][key]}" for key, label in labels.items() if record["versions"].get(key)]
        head.append(f"{name}: {', '.join(listed)}")
    rows = [
        [row, *(cell(record["results"], pattern, kind) for _, record in environments)] for row, kind, pattern in ROWS
    ]
    return markdown.table(head, rows)


SECTIONS = {"docs/training-setups.md": {"setups": table}}


def main() -> int:
    """Print the table, or record a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="XML", help="a JUnit file of pytest")
    junit = parser.parse_args().record
    print(write_record(junit) if junit else table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
