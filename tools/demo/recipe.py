"""The recipe of the embedded pipeline: from rendered images to a trained Stable Diffusion pipeline.

Stages, each resumable from its checkpoints in the working folder: `tokenizer`, `clip`, `vae`, `unet`,
`assemble`. Only seen pairs are trained on. The result consists of stock diffusers and transformers
classes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from asdm.data.batches import ShuffledBatches
from asdm.diffusion.conditioning import encode_images
from asdm.errors import AsdmError
from asdm.files import replacing_folder, write_text
from asdm.images import load_images
from asdm.measure.machine import fast_training
from asdm.training.checkpoints import checkpoint_step, load_ema_weights
from asdm.training.launch import make_accelerator
from asdm.training.loop import LoopSettings, train
from asdm.training.task import TrainingTask
from tools.demo.emoji import IMAGE_SIZE, STYLES, Pair, all_pairs, concepts, seen_pairs
from tools.demo.tasks import AutoencoderTask, ContrastTask, ImageTowerTask, NoisePredictionTask, read_two_captions

CAPTION_LENGTH = 16
TEXT_WIDTH = 256


LOOPS: dict[str, LoopSettings] = {
    "clip": LoopSettings(
        steps=400,
        learning_rate=1e-3,
        # The text tower keeps its words apart only if it learns more slowly than the image tower.
        optimizer="muon",
        learning_rate_factors={"clip.text_model.embeddings.": 0.3, "clip.text_model.": 0.6},
        warmup_steps=50,
        weight_decay=0.2,
        ema_decay=0.99,
        checkpoint_every=100,
    ),
    "image_tower": LoopSettings(
        steps=3000,
        optimizer="muon",
        learning_rate=1e-3,
        warmup_steps=30,
        weight_decay=0.2,
        ema_decay=0.98,
        checkpoint_every=50,
    ),
    "vae": LoopSettings(
        steps=2000,
        learning_rate=1.5e-3,
        warmup_steps=100,
        weight_decay=0.0,
        ema_decay=0.998,
        checkpoint_every=200,
    ),
    "unet": LoopSettings(
        steps=14500,
        schedule="constant_then_linear",
        falling_steps=2500,
        optimizer="muon",
        learning_rate=4e-4,
        betas=(0.9, 0.99),
        warmup_steps=50,
        weight_decay=0.01,
        ema_decay=0.999,
        checkpoint_every=100,
    ),
}
RENDERING = ("up_blocks.2.", "up_blocks.3.")  # decide how something is drawn; the others, what
BATCH_SIZES = {"image_tower": 128, "vae": 16, "unet": 32}
CONCEPTS_A_BATCH, OTHER_CAPTIONS = 24, 256  # of the contrast: some 108 images, and captions besides theirs


@dataclass(frozen=True)
class Recipe:
    """Where the recipe works and what it starts from.

    After each training step, `progress` gets the stage's name and the step's row. With `start`, a pipeline folder, its
    parts are trained further, and parts that the working folder has not trained are taken from it.
    """

    images: Path
    folder: Path
    progress: Callable[[str, dict[str, float]], None] | None = None
    start: Path | None = None

    @fast_training()
    def build(self, stage: str = "all", stop_after_seconds: float | None = None) -> bool:
        """Run one stage, or all in order; returns whether it is done (not stopped by the time given)."""
        stages: dict[str, Callable[[float | None], bool]] = {
            "tokenizer": self._tokenizer_stage,
            "clip": self._clip_stage,
            "vae": self._vae_stage,
            "unet": self._unet_stage,
            "assemble": self._assemble_stage,
        }
        chosen = list(stages) if stage == "all" else [stage]
        return all(stages[name](stop_after_seconds) for name in chosen)

    # -- stages --------------------------------------------------------------------------------

    def _tokenizer_stage(self, _: float | None) -> bool:
        if (self.folder / "tokenizer").is_dir():  # CLIP has learnt this one
            return True
        with replacing_folder(self.folder / "tokenizer") as folder:
            make_tokenizer([pair.caption for pair in all_pairs()]).save_pretrained(folder)
        return True

    def _clip_stage(self, stop_after_seconds: float | None) -> bool:
        tokenizer = self._tokenizer()
        pairs = seen_pairs()
        images = self._images(pairs)
        input_ids = tokenize(tokenizer, [pair.caption for pair in pairs])
        names = list(concepts())
        clip = make_clip(tokenizer)
        if self.start is not None:
            take_over(clip, tokenizer, self.start)
        task = ContrastTask(clip, tokenize(tokenizer, names))
        concept_of = torch.tensor([names.index(pair.concept) for pair in pairs])
        shown = concept_of.unique()
        order = ShuffledBatches(len(shown), CONCEPTS_A_BATCH, seed=0)

        def batch_at(step: int) -> dict[str, Tensor]:
            chosen = torch.isin(concept_of, shown[order(step)]).nonzero()[:, 0]
            generator = torch.Generator().manual_seed(step)
            others = torch.randperm(len(pairs), generator=generator)
            others = others[~torch.isin(others, chosen)][:OTHER_CAPTIONS]
            return {
                "images": images[chosen],
                "input_ids": input_ids[torch.cat([chosen, others])],
                "concepts": concept_of[chosen],
            }

        if not self._train("clip", task, batch_at, stop_after_seconds):
            return False
        return self._image_tower(images, concept_of, stop_after_seconds)

    def _image_tower(self, images: Tensor, concept_of: Tensor, stop_after_seconds: float | None) -> bool:
        """Train the second half of `clip`, of which a UNet sees nothing; `concept_of` are the images' concepts."""
        clip, tokenizer, pairs = self._clip(), self._tokenizer(), seen_pairs()
        with torch.no_grad():
            captions, names = (
                clip.text_model(input_ids=tokenize(tokenizer, texts)).pooler_output
                for texts in ([pair.caption for pair in pairs], list(concepts()))
            )
        styles = torch.tensor([STYLES.index(pair.style) for pair in pairs])
        alike = members([pair.design for pair in pairs])
        task = ImageTowerTask(clip, captions, names, styles)
        order = ShuffledBatches(len(images), BATCH_SIZES["image_tower"], seed=0)

        def batch_at(step: int) -> dict[str, Tensor]:
            chosen = order(step)
            generator = torch.Generator().manual_seed(step)
            return {
                "images": images[chosen],
                "others": images[one_of_each(alike, chosen, generator)],
                "captions": chosen,
                "concepts": concept_of[chosen],
            }

        return self._train("image_tower", task, batch_at, stop_after_seconds)

    def _vae_stage(self, stop_after_seconds: float | None) -> bool:
        images = self._images(seen_pairs())
        order = ShuffledBatches(len(images), BATCH_SIZES["vae"], seed=0)

        def batch_at(step: int) -> dict[str, Tensor]:
            return {"images": images[order(step)]}

        return self._train("vae", AutoencoderTask(self._untrained_vae()), batch_at, stop_after_seconds)

    def _unet_stage(self, stop_after_seconds: float | None) -> bool:
        pairs = seen_pairs()
        vae, text_encoder, tokenizer = self._vae(), self._clip().text_model, self._tokenizer()
        with torch.no_grad():
            latents = encode_images(vae, self._images(pairs))
            captions = [pair.caption for pair in pairs]
            embeddings = text_encoder(tokenize(tokenizer, [*captions, ""])).last_hidden_state
        order = ShuffledBatches(len(pairs), BATCH_SIZES["unet"], seed=0)
        concept_tokens = torch.tensor(
            [len(tokenizer(pair.concept, add_special_tokens=False).input_ids) for pair in pairs]
        )
        captions_of = TwoCaptions(StyleSwap(embeddings, concept_tokens, pairs), pairs)

        def batch_at(step: int) -> dict[str, Tensor]:
            chosen = order(step)
            design, rendering = captions_of(chosen, step)
            return {"latents": latents[chosen], "design_states": design, "rendering_states": rendering}

        unet = make_unet()
        if self.start is not None:
            unet = UNet2DConditionModel.from_pretrained(self.start / "unet", dtype=torch.float32)
        read_two_captions(unet, RENDERING)
        task = NoisePredictionTask(unet, make_noise_schedule(), embeddings[-1:])
        return self._train("unet", task, batch_at, stop_after_seconds)

    def _assemble_stage(self, _: float | None) -> bool:
        unet = make_unet()
        load_ema_weights(self.folder / "unet", {f"unet.{name}": p for name, p in unet.named_parameters()})
        clip = self._clip()
        pipeline = StableDiffusionPipeline(
            vae=self._vae(),
            text_encoder=clip.text_model,
            tokenizer=self._tokenizer(),
            unet=unet,
            scheduler=DPMSolverMultistepScheduler.from_config(
                make_noise_schedule().config, timestep_spacing="trailing", algorithm_type="dpmsolver++"
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        with replacing_folder(self.folder / "pipeline") as folder:
            pipeline.to(torch.float16).save_pretrained(folder)
            clip.to(torch.float16).save_pretrained(folder / "clip")
            for part in ("text_encoder", "clip"):
                _load_in_float32(folder / part / "config.json")
        return True

    # -- what one stage needs of another ---------------------------------------------------------

    def _train(
        self,
        name: str,
        task: TrainingTask,
        batch_at: Callable[[int], dict[str, Tensor]],
        stop_after_seconds: float | None,
    ) -> bool:
        return train(
            task,
            batch_at,
            LOOPS[name],
            self.folder / name,
            accelerator=make_accelerator("cpu", "auto"),
            progress=None if self.progress is None else partial(self.progress, name),
            stop_after_seconds=stop_after_seconds,
        )

    def _images(self, pairs: list[Pair]) -> Tensor:
        return load_images([self.images / pair.file_name for pair in pairs], IMAGE_SIZE)

    def _tokenizer(self) -> CLIPTokenizer:
        folder = self.folder / "tokenizer"
        if not folder.is_dir():
            if self.start is None:
                raise AsdmError(f"{folder}: no tokenizer; run that stage first")
            folder = self.start / "tokenizer"
        return CLIPTokenizer.from_pretrained(folder)

    def _clip(self) -> CLIPModel:
        if self.start is not None and not checkpoint_step(self.folder / "clip"):
            self._refuse_another_tokenizer(self.start)
            return CLIPModel.from_pretrained(self.start / "clip", dtype=torch.float32).eval()
        clip = make_clip(self._tokenizer())
        weights = {f"clip.{name}": p for name, p in clip.named_parameters()}
        load_ema_weights(self.folder / "clip", weights)
        if checkpoint_step(self.folder / "image_tower"):
            trained = {name: p for name, p in weights.items() if not name.startswith("clip.text_model.")}
            load_ema_weights(self.folder / "image_tower", trained)
        return clip.eval()

    def _refuse_another_tokenizer(self, start: Path) -> None:
        own, known = (CLIPTokenizer.from_pretrained(each / "tokenizer").get_vocab() for each in (self.folder, start))
        if own != known:
            raise AsdmError(f"{self.folder}: its tokenizer is not that of the CLIP in {start}; run clip first")

    def _untrained_vae(self) -> AutoencoderKL:
        """Return what the VAE's training starts from. A trained one keeps its encoder, and so the latents that a UNet
        was or is being trained on."""
        if self.start is None:
            return make_vae()
        vae = AutoencoderKL.from_pretrained(self.start / "vae", dtype=torch.float32)
        vae.register_to_config(_name_or_path="")
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        return vae

    def _vae(self) -> AutoencoderKL:
        vae = self._untrained_vae().eval()
        if self.start is None or checkpoint_step(self.folder / "vae"):
            trained = {f"vae.{name}": p for name, p in vae.named_parameters() if p.requires_grad}
            load_ema_weights(self.folder / "vae", trained)
        if self.start is None:
            normalise_latents(vae, self._images(seen_pairs()))
        return vae


def members(keys: Sequence[Hashable]) -> list[list[int]]:
    """For each key the indices of all that are equal to it."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    return [groups[key] for key in keys]


def one_of_each(groups: list[list[int]], chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Return a member of each chosen index's group, drawn at random."""
    drawn = [groups[index] for index in chosen.tolist()]
    return torch.tensor([group[int(torch.randint(len(group), (), generator=generator))] for group in drawn])


class StyleSwap:
    """Caption embeddings (batch, tokens, channels) for training, whose tokens behind the concept's say the style and
    nothing else.

    They are taken from a caption of the same style and length, drawn at random: those tokens have read the concept, and
    a UNet that learns a pair by them draws something else for a pair that it has not seen. And at times they are the
    empty caption's, of no style, so that the UNet learns what the drawings of a concept share.

    Args:
        embeddings: of the captions of `pairs`, and last of the empty one.
        concept_tokens: how many tokens each pair's concept has.
    """

    style_dropout = 0.05

    def __init__(self, embeddings: Tensor, concept_tokens: Tensor, pairs: Sequence[Pair]):
        self.embeddings, self.concept_tokens = embeddings, concept_tokens
        self.alike = members(list(zip(concept_tokens.tolist(), (pair.style for pair in pairs), strict=True)))

    def __call__(self, chosen: Tensor, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        others = one_of_each(self.alike, chosen, generator)
        dropped = torch.rand(len(chosen), generator=generator) < self.style_dropout
        styles = torch.where(dropped, len(self.embeddings) - 1, others)
        # The first token opens the caption, and the concept's follow it.
        behind = torch.arange(self.embeddings.shape[1]) > self.concept_tokens[chosen][:, None]
        return torch.where(behind[:, :, None], self.embeddings[styles], self.embeddings[chosen])


class TwoCaptions:
    """Caption embeddings in two, each (batch, tokens, channels), for a training that keeps design and style apart.

    The blocks that decide what is drawn read the pair's concept in the style of any seen drawing of its design; the
    blocks that render it (`RENDERING`) read the pair's style with any concept. So no block can tell which of a design's
    seen variants is drawn, and the UNet cannot learn those pairs by heart. Without this the error of x_0 on held-out
    pairs rises from the middle of the training on, while that on seen ones falls.
    """

    def __init__(self, swap: StyleSwap, pairs: Sequence[Pair]):
        self.swap = swap
        self.same_design = members([pair.design for pair in pairs])
        self.same_style = members([pair.style for pair in pairs])

    def __call__(self, chosen: Tensor, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        designs, styles = (one_of_each(groups, chosen, generator) for groups in (self.same_design, self.same_style))
        return self.swap(designs, 2 * step), self.swap(styles, 2 * step + 1)


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Return a CLIP tokenizer whose merges are learnt from `captions`: their words become single tokens, and
    any other text still splits into smaller pieces."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [f"{letter}</w>" for letter in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        initial_alphabet=alphabet,
        special_tokens=endings,  # numbered here; the trainer would number them by chance, and order ties by the numbers
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([caption.lower() for caption in captions], trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = alphabet + endings + ["".join(merge) for merge in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CAPTION_LENGTH)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids (captions, CAPTION_LENGTH), padded as the pipeline pads them."""
    return tokenizer(
        captions, padding="max_length", max_length=CAPTION_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    torch.manual_seed(0)
    shared = {"hidden_act": "quick_gelu", "attention_dropout": 0.0}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": CAPTION_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    config = CLIPConfig(text_config=text | shared, vision_config=vision | shared, projection_dim=TEXT_WIDTH)
    clip = CLIPModel(config)
    # With CLIP's own deviation of 0.02, a few hundred captions end in a space of nine dimensions (the
    # exponential of the spectrum's entropy), and a UNet takes long to tell them apart.
    clip.text_model.embeddings.token_embedding.weight.data *= 50
    return clip


def take_over(clip: CLIPModel, tokenizer: CLIPTokenizer, start: Path) -> None:
    """Give `clip` the weights of an earlier pipeline's, whose tokenizer may have other words: the embeddings of those
    that both know are kept."""
    earlier = CLIPModel.from_pretrained(start / "clip", dtype=torch.float32).state_dict()
    known = CLIPTokenizer.from_pretrained(start / "tokenizer").get_vocab()
    words = "text_model.embeddings.token_embedding.weight"
    # Drawn by a seed of its own: by `make_clip`'s, a new word would begin as the twin of the earlier one in its row.
    spread = clip.state_dict()[words].std()
    embeddings = spread * torch.randn(clip.state_dict()[words].shape, generator=torch.Generator().manual_seed(2))
    for word, index in tokenizer.get_vocab().items():
        if word in known:
            embeddings[index] = earlier[words][known[word]]
    clip.load_state_dict(earlier | {words: embeddings})


def make_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
    )


def make_unet() -> UNet2DConditionModel:
    """SD 1.x's topology, narrow: four levels, two layers each, attention on the three outer levels."""
    torch.manual_seed(2)
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 160, 160),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
    )


def make_noise_schedule() -> DDPMScheduler:
    """SD 1.x's noise schedule, with v-prediction as in SD 2.x."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
    )


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold the per-channel mean and deviation of the latents of `images` into `quant_conv` and
    `post_quant_conv`, so that the latents have mean 0 and deviation 1 and reconstructions stay the same."""
    latents = encode_images(vae, images) / vae.config.scaling_factor
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    quant, post_quant = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    quant.weight[:channels] /= deviation[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / deviation
    quant.bias[channels:] -= 2 * deviation.log()  # the posterior's log variance
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean
    post_quant.weight *= deviation[None, :, None, None]


def _load_in_float32(path: Path) -> None:
    """Say so in a transformers config: it would load in the dtype of the file, and diffusers in float32."""
    config = json.loads(path.read_text("utf-8"))
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if part is not None:
            part["dtype"] = "float32"
    write_text(path, json.dumps(config, indent=2) + "\n")
