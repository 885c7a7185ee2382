"""Make the README's table of training setups from test results, and nothing else.

    pytest tests --junitxml=outputs/NAME.xml                           # in each environment
    python benchmarks/setups_table.py --record outputs/NAME.xml        # -> benchmarks/results/setups/NAME.json
    python benchmarks/setups_table.py                                  # rewrites the table in README.md
    python benchmarks/setups_table.py --check                          # fails if it is not what the results say

A row is "works" or "refused" (with a clear error) if every test behind it passed, "FAILS" if one did not, and "not run"
if none ran. `python benchmarks/setups_gpu.py` adds the rows that need GPUs, as results/setups/gpu.json.
"""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "setups"
BEGIN, END = "<!-- setups: begin -->", "<!-- setups: end -->"

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


def record(path: Path) -> Path:
    """Keep of a JUnit file what the table needs: versions, and each test's "passed", "failed" or "skipped"."""
    root = ET.parse(path).getroot()
    versions = {p.get("name", ""): p.get("value", "") for p in root.iter("property")}
    results = {}
    for case in root.iter("testcase"):
        states = {child.tag for child in case}
        bad = states & {"failure", "error"}
        results[case.get("name", "")] = "failed" if bad else "skipped" if "skipped" in states else "passed"
    used = {name: state for name, state in results.items() if any(re.search(p, name) for _, _, p in ROWS)}
    target = RESULTS / f"{path.stem}.json"
    target.write_text(json.dumps({"versions": versions, "results": used}, indent=1, sort_keys=True) + "\n")
    return target


def cell(results: dict[str, str], pattern: str, kind: str) -> str:
    """What one environment's results say of one row."""
    states = [state for name, state in results.items() if re.search(pattern, name) and state != "skipped"]
    if not states:
        return "not run"
    return kind if set(states) == {"passed"} else "**FAILS**"


def table() -> str:
    """The table as Markdown."""
    environments = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        environments.append((path.stem, content["versions"], content["results"]))
    head = ["setup"]
    for name, versions, _ in environments:
        listed = [f"{label} {versions[key]}" for key, label in (("python", "Python"), ("torch", "torch"),
                  ("transformers", "transformers"), ("peft", "peft")) if versions.get(key)]  # fmt: skip
        head.append(f"{name}: {', '.join(listed)}")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row, kind, pattern in ROWS:
        lines.append("| " + " | ".join([row, *(cell(results, pattern, kind) for _, _, results in environments)]) + " |")
    return "\n".join(lines)


def main() -> int:
    """Rewrite the table, or check it."""
    if "--record" in sys.argv:
        print(record(Path(sys.argv[sys.argv.index("--record") + 1])))
        return 0
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    wanted = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if "--check" in sys.argv:
        if wanted != text:
            print("README.md's table of setups is not what benchmarks/results/setups/ says: run this without --check")
        return int(wanted != text)
    readme.write_text(wanted)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
