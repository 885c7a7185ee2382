"""The action head's blocks are found by structure and by whole words of names; other transformers are left out."""

from __future__ import annotations

import copy
import logging
import re

import pytest
from helpers.toys import Block, DitPolicy, OwnLam, make_batch
from torch import nn

from lara_adapter import PolicySpec, TapNotFound, attach_lara
from lara_adapter.heads import block_candidates, doubt, find_blocks
from lara_adapter.inspection import describe_policy


def tree(*lists: str, root: str = "Policy", block: type[nn.Module] = Block) -> nn.Module:
    """A module with lists of three blocks: "action_model.net:DiT.blocks", where a class is other than Module."""
    policy = type(root, (nn.Module,), {})()
    for path in lists:
        module, names = policy, path.split(".")
        for part in names[:-1]:
            name, _, cls = part.partition(":")
            if not hasattr(module, name):
                module.add_module(name, type(cls or "Part", (nn.Module,), {})())
            module = getattr(module, name)
        module.add_module(names[-1], nn.ModuleList(block() for _ in range(3)))
    return policy


def kind(path: str, root: str = "Policy", block: type[nn.Module] = Block) -> str | None:
    (found,) = block_candidates(tree(path, root=root, block=block))
    return found.kind


@pytest.mark.parametrize(
    "path",
    [
        "action_head.model.transformer_blocks", "actionHead.layers", "action_model.net.blocks", "model.net:DiT.blocks",
        "net:DiTX.blocks", "net:MMDiT.blocks", "model:RDT.blocks", "dit", "dit2.blocks", "diffuser.layers",
        "net:TransformerForDiffusion.decoder.layers", "model:GCDenoiser.inner_model.decoder.blocks",
        "denoising_net.blocks", "noise_predictor.blocks", "noise_pred_net.layers", "velocity.blocks",
        "model:VLAFlowMatching.core.layers", "policy_head.blocks", "action_head.trunk:TransformerEncoder.layers",
        "action_head.transformer:MyTransformerEncoder.layers", "vlm_with_expert.lm_expert.layers",
        "paligemma_with_expert.gemma_expert.model:GemmaModel.layers", "model:LanguageConditionedDiT.blocks",
        "net:ActionVisionTransformer.blocks", "image_to_action.blocks", "action_head.backbone.blocks",
    ],
)  # fmt: skip
def test_names_of_action_heads(path):
    assert kind(path) == "head"
    assert doubt(tree(path), re.sub(r":\w+", "", path)) is None


def test_the_class_of_a_policy_counts_only_for_blocks_of_its_own():
    assert kind("blocks", root="DitPolicy") == kind("blocks", root="DiffusionImagePolicy") == "head"
    assert kind("blocks", root="VisionLanguageActionPolicy") == "head"
    assert kind("blocks", root="ImagePolicy") is None
    assert kind("obs_net.blocks", root="DiffusionPolicy") is None


def test_the_class_of_a_block_counts_where_names_say_nothing():
    dit, vit, gemma = (type(name, (Block,), {}) for name in ("DiTBlock", "ViTBlock", "GemmaDecoderLayer"))
    assert [kind("model.layers", block=block) for block in (dit, vit, gemma)] == ["head", "apart", "apart"]
    assert kind("video_model.layers", block=dit) == "apart"
    assert kind("expert.layers", block=gemma) == "head"


@pytest.mark.parametrize(
    "path",
    ["condition.layers", "conditional_net.layers", "traditional.blocks", "transaction.blocks", "airflow.blocks",
     "overflow.blocks", "editor.blocks", "additional:Auditory.blocks", "reaction.blocks", "experts.blocks",
     "net:Transformer.decoder.layers", "action_conditioned_model.blocks"],
)  # fmt: skip
def test_a_word_inside_another_does_not_count(path):
    assert kind(path) is None


@pytest.mark.parametrize(
    "path",
    [
        "condition_encoder.layers", "action_encoder.layers", "action_head.condition_encoder.layers",
        "noise_tokenizer.layers", "encoder.layers", "obs:ConditionEncoder.layers", "vae.blocks", "vision_tower.blocks",
        "visual.blocks", "vit.blocks", "net:ViT.blocks", "features:SigLIPModel.layers", "dinov2.blocks",
        "image_net.blocks", "action_head.obs:CLIPModel.layers", "text_model.layers", "model.language_model.layers",
        "llm.layers", "vlm_with_expert.vlm.model.layers", "paligemma_with_expert.paligemma.model.layers",
        "action_head.vl_self_attention.transformer_blocks", "vlm_backbone.layers", "backbone.layers",
        "core:Qwen2ForCausalLM.layers", "ema.net.blocks", "ema_diffusion.net.blocks", "action_head_ema.blocks",
        "teacher.action_head.blocks", "target_policy.dit.blocks", "momentum.dit.blocks", "shadow.action_head.blocks",
        "copy:AveragedModel.action_head.blocks", "original_module.action_head.blocks",
    ],
)  # fmt: skip
def test_names_of_other_transformers(path):
    assert kind(path) == "apart"
    with pytest.raises(TapNotFound, match=r"encoder, language model or copy.*3 x Block.*blocks='\.\.\.'"):
        find_blocks(tree(path))


@pytest.mark.parametrize(
    ("lists", "found"),
    [
        # CogACT with EMA, DexVLA, SmolVLA, GR00T, RDT, diffusion_policy with condition layers, FLOWER
        (("vlm.llm_backbone.llm.layers", "vlm.vision_backbone.dino_featurizer.blocks", "action_model.net.blocks",
          "ema_diffusion.net.blocks"), "action_model.net.blocks"),
        (("model:Qwen2VLModel.layers", "policy_head:ScaleDP.blocks"), "policy_head.blocks"),
        (("model.vlm_with_expert.vlm.model.text_model.layers", "model.vlm_with_expert.lm_expert.layers"),
         "model.vlm_with_expert.lm_expert.layers"),
        (("backbone.eagle_model.language_model.model.layers", "action_head.vl_self_attention.transformer_blocks",
          "action_head.model:DiT.transformer_blocks"), "action_head.model.transformer_blocks"),
        (("model:RDT.blocks", "lang_adaptor.blocks"), "model.blocks"),
        (("model:TransformerForDiffusion.encoder.layers", "model.decoder.layers"), "model.decoder.layers"),
        (("vlm.language_model.layers", "dit"), "dit"),
        # nothing says head, but only one is not something else
        (("condition_encoder.layers", "trunk.layers"), "trunk.layers"),
        (("condition_encoder.layers", "action_head.blocks"), "action_head.blocks"),
        (("conditioner.layers", "action_head.blocks"), "action_head.blocks"),
        (("teacher.dit.blocks", "student.dit.blocks"), "student.dit.blocks"),
    ],
)  # fmt: skip
def test_the_head_beside_other_transformers(lists, found):
    assert find_blocks(tree(*lists)) == found


def test_two_heads_are_refused():
    with pytest.raises(
        TapNotFound, match=r"several lists of attention blocks: action_left.blocks \(3 x Block\); action_ri"
    ):
        find_blocks(tree("action_left.blocks", "action_right.blocks", "vit.blocks"))
    many = tree(*(f"part{chr(97 + i)}.blocks" for i in range(12)))
    with pytest.raises(TapNotFound, match=r"parth\.blocks \(3 x Block\); and 4 more\. Say which"):
        find_blocks(many)


def test_a_vit_beside_a_unet_head_is_not_taken_for_the_head():
    policy = tree("obs_encoder.vit.blocks")
    policy.diffusion_head = nn.Sequential(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 3, 3))
    with pytest.raises(TapNotFound, match=r"obs_encoder\.vit\.blocks \(3 x Block\)\. If one of them"):
        attach_lara(policy, OwnLam())
    assert find_blocks(policy.obs_encoder.vit) == "blocks"  # a ViT of one's own: named by nobody


def test_peft_keeps_a_frozen_original_beside_the_module_that_trains():
    peft = pytest.importorskip("peft")
    policy = nn.Module()
    policy.dit, policy.out = DitPolicy(), nn.Linear(2, 2)
    wrapped = peft.get_peft_model(policy, peft.LoraConfig(r=2, target_modules=["out"], modules_to_save=["dit"]))
    assert find_blocks(wrapped.get_base_model()) == "dit.modules_to_save.default.transformer_blocks"


# ---------------------------------------------------------------------- containers


def test_a_module_dict_and_numbered_attributes_are_found():
    policy = nn.Module()
    policy.action_blocks = nn.ModuleDict({f"b{i}": Block() for i in range(4)})
    assert find_blocks(policy) == "action_blocks"
    policy = nn.Module()
    policy.dit = nn.Module()
    for i in (10, 2, 1, 0, 9):
        policy.dit.add_module(f"block_{i}", Block())
    assert [str(c) for c in block_candidates(policy)] == ["dit.block_* (5 x Block)"]
    (found,) = block_candidates(policy)
    assert found.blocks == [getattr(policy.dit, f"block_{i}") for i in (0, 1, 2, 9, 10)]
    one = nn.Module()
    one.block0 = Block()
    assert block_candidates(one) == []


def test_a_list_of_networks_is_not_a_list_of_blocks():
    heads = nn.Module()
    heads.action_heads = nn.ModuleDict({"arm": DitPolicy(), "hand": DitPolicy()})
    with pytest.raises(TapNotFound, match=r"action_heads\.arm\.transformer_blocks \(5 x Block\); action_heads\.hand"):
        find_blocks(heads)
    policy = tree("dit.blocks")
    policy.encoder1, policy.encoder2 = DitPolicy(), DitPolicy()
    assert find_blocks(policy) == "dit.blocks"
    mixture = nn.Module()  # one network per stream, as open-pi-zero has it
    mixture.mixtures = nn.ModuleDict({name: tree("layers", root="Mixture") for name in ("vlm", "action")})
    assert find_blocks(mixture) == "mixtures.action.layers"


def test_attentions_and_parts_per_modality_inside_a_block_do_not_make_it_a_network():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_drop = nn.Dropout()

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn1, self.attn2, self.attn3 = Attention(), Attention(), Attention()
            self.parts = nn.ModuleDict({"image": Block(), "action": Block()})

    policy = nn.Module()
    policy.dit_blocks = nn.ModuleList(Inner() for _ in range(3))
    assert find_blocks(policy) == "dit_blocks"


def test_two_attentions_of_a_part_are_not_blocks():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_drop = nn.Dropout()

    policy = nn.Module()
    policy.unet = nn.Module()
    policy.unet.mid_attn1, policy.unet.mid_attn2 = Attention(), Attention()
    assert block_candidates(policy) == []


def test_a_denoiser_that_is_an_encoder_is_taken_and_said_unless_a_decoder_stands_beside_it():
    def denoiser(*parts):
        layer = {"encoder": nn.TransformerEncoderLayer, "decoder": nn.TransformerDecoderLayer}
        stack = {"encoder": nn.TransformerEncoder, "decoder": nn.TransformerDecoder}
        policy = tree("model:TransformerForDiffusion.x")
        del policy.model.x
        for part in parts:
            policy.model.add_module(part, stack[part](layer[part](16, 2, batch_first=True), 3))
        return policy

    assert find_blocks(denoiser("encoder")) == "model.encoder.layers"
    assert "no name says" in doubt(denoiser("encoder"), "model.encoder.layers")
    assert find_blocks(denoiser("encoder", "decoder")) == "model.decoder.layers"
    assert doubt(denoiser("encoder", "decoder"), "model.decoder.layers") is None
    policy = tree("encoder.x")
    policy.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 3)
    with pytest.raises(TapNotFound, match="encoder, language model or copy"):
        find_blocks(policy)


def test_weight_tied_depth_counts_every_place():
    policy = nn.Module()
    policy.dit = nn.ModuleList([Block()] * 6)
    (found,) = block_candidates(policy)
    assert (found.path, len(found.blocks)) == ("dit", 6)


# ---------------------------------------------------------------------- what is said


class Unnamed(DitPolicy):
    """Its class does not say what it is."""


Unnamed.__name__ = "Toy"


def test_blocks_taken_without_a_sign_are_said_once(caplog):
    policy = Unnamed().train()
    with caplog.at_level(logging.WARNING):
        lara = attach_lara(policy, OwnLam())
        policy(make_batch())
        policy(make_batch())
    (record,) = caplog.records
    for part in (
        "transformer_blocks (5 x Block)",
        "the only list of attention blocks",
        "lara.check(batch)",
        "blocks='...'",
    ):
        assert part in record.getMessage()
    lara.detach()
    report = describe_policy(policy)
    assert report.ok
    assert report.warnings == [record.getMessage()]


@pytest.mark.parametrize(
    "arguments", [{"blocks": "transformer_blocks"}, {"spec": PolicySpec("x", blocks="transformer_blocks")}]
)
def test_what_the_user_or_a_row_names_is_not_doubted(arguments, caplog):
    attach_lara(Unnamed().train(), OwnLam(), **arguments)
    attach_lara(DitPolicy(), OwnLam())
    assert not caplog.records


def test_an_ema_twin_beside_the_policy(caplog):
    policy = nn.Module()
    policy.model = DitPolicy()
    policy.model_ema = copy.deepcopy(policy.model)
    assert find_blocks(policy) == "model.transformer_blocks"
    assert doubt(policy, "model.transformer_blocks") is None  # the class of the owner says DiT
