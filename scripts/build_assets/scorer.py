"""Train the text-image scorer, and with it the text encoder of the embedded model.

    OMP_NUM_THREADS=1 python scripts/build_assets/scorer.py --minutes 24
    OMP_NUM_THREADS=1 python scripts/build_assets/scorer.py --minutes 25 --refine

The first command trains both halves. The second goes on with the image half alone, so that the
text encoder stays what the text-to-image model was trained with. The same command resumes after
an interruption. Writes the scorer and `metrics.json` to `--output`; training state lies beside
it, in `OUTPUT-state` and `OUTPUT-refined-state`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from augmentation import PALETTE, Augmentation
from common import BACKGROUNDS, SIZE, STYLES
from drawings import Pictures
from features import Budget, adamw, flags, share, train
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffkit.files import write_json
from diffkit.models.text_image_scorer import TextImageScorer, TextImageScorerConfig

VOCABULARY = 3000
MAX_LENGTH = 32
SMALL_SHARE = 0.75
"""Share of the time that is spent on pictures of half the size, at four times the speed."""
START, END = "<|startoftext|>", "<|endoftext|>"
COLOURS = tuple(BACKGROUNDS)
GENTLE = Augmentation(0.3, 8.0, (0.85, 1.12), 0.08, 0.08, 0.3, 0.04)
FULL = "{name}, {style} style, {colour} background"
TEMPLATES = (
    "{name}, {style} style",
    "{name}, {colour} background",
    "{name}",
    "a {name} in {style} style on a {colour} background",
    "{style} style {name} on {colour} background",
    "{colour} background, {style} style, {name}",
    "{name} on {colour}",
)


def phrases_of(concept: dict[str, Any], words: list[str]) -> list[str]:
    """The name of a concept, its given words, then its keywords of one to three plain words."""
    keywords = [word.replace("\xa0", " ").replace("’", "'").lower() for word in concept["keywords"]]
    plain = [word for word in keywords if re.fullmatch(r"[a-zà-ÿ'-]{2,}( [a-zà-ÿ'-]+){0,2}", word)]
    straight = concept["name"].replace("’", "'")
    return list(dict.fromkeys([concept["name"], straight, *words, *plain]))


def make_tokenizer(names: list[str], keywords: list[str]) -> CLIPTokenizer:
    """A byte-level BPE tokenizer of CLIP's own class whose merges are learnt from the captions.

    Every byte is a token, alone and at the end of a word, so that any text can be encoded.
    """
    stock = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = stock.normalizer, stock.pre_tokenizer
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=symbols,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    attributes = [FULL.format(name="", style=s, colour=c) for s in STYLES for c in COLOURS]
    common = [*attributes, *TEMPLATES, "a an the picture photo painting drawing of and with"]
    learner.train_from_iterator([*names * 8, *keywords, *common * 20], trainer)
    learnt = json.loads(learner.to_str())["model"]["merges"]
    merges = [(first, second) for first, second in learnt][: VOCABULARY - 2 - len(base)]
    pieces = list(dict.fromkeys([*base, *(a + b for a, b in merges), START, END]))
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        model_max_length=MAX_LENGTH,
    )


@dataclass
class Captions:
    """Texts and what each says; -1 where a text names no style or no colour."""

    texts: list[str]
    phrase: Tensor
    concept: Tensor
    style: Tensor
    colour: Tensor


class Writer:
    """Writes captions for (concept, style, colour), and knows which captions fit a picture."""

    def __init__(self, pictures: Pictures) -> None:
        self.choices = [
            phrases_of(concept, pictures.words.get(concept["id"], []))
            for concept in pictures.concepts
        ]
        counts = Counter(phrase for choice in self.choices for phrase in choice)
        self.phrases = {phrase: index for index, phrase in enumerate(counts)}
        self.weights = [
            torch.tensor([1.0 / counts[phrase] for phrase in choice[1:]]) for choice in self.choices
        ]
        self.fits = torch.zeros(len(self.phrases), len(self.choices), dtype=torch.bool)
        for concept, choice in enumerate(self.choices):
            for phrase in choice:
                self.fits[self.phrases[phrase], concept] = True

    def write(self, concept: Tensor, style: Tensor, colour: Tensor, g: torch.Generator) -> Captions:
        """One caption each; a colour of -1 has no name and is never mentioned."""
        keyword = (torch.rand(len(concept), generator=g) < 0.35).tolist()
        varied = (torch.rand(len(concept), generator=g) < 0.35).tolist()
        pick = torch.randint(len(TEMPLATES), (len(concept),), generator=g).tolist()
        texts, phrases, styles, colours = [], [], [], []
        triples = zip(concept.tolist(), style.tolist(), colour.tolist(), strict=True)
        for row, (c, s, b) in enumerate(triples):
            phrase = self.choices[c][0]
            if keyword[row] and len(self.weights[c]):
                phrase = self.choices[c][1 + int(self.weights[c].multinomial(1, generator=g))]
            template = TEMPLATES[pick[row]] if varied[row] else FULL
            if b < 0:
                template = TEMPLATES[0] if "{style}" in template else TEMPLATES[2]
            texts.append(template.format(name=phrase, style=STYLES[s], colour=COLOURS[b]))
            phrases.append(self.phrases[phrase])
            styles.append(s if "{style}" in template else -1)
            colours.append(b if "{colour}" in template else -1)
        said = (torch.tensor(phrases), concept, torch.tensor(styles), torch.tensor(colours))
        return Captions(texts, *said)

    def matches(self, texts: Captions, concept: Tensor, style: Tensor, colour: Tensor) -> Tensor:
        """Booleans (texts, pictures): everything the text says is true of the picture."""
        fits = self.fits[texts.phrase][:, concept]
        fits &= (texts.style[:, None] < 0) | (texts.style[:, None] == style)
        return fits & ((texts.colour[:, None] < 0) | (texts.colour[:, None] == colour))


class Players(nn.Module):
    """The scorer, and the linear heads that training alone uses."""

    def __init__(self, scorer: TextImageScorer, concepts: int) -> None:
        super().__init__()
        self.scorer = scorer
        sizes = (concepts, len(STYLES) + 1, len(COLOURS) + 1)
        width = scorer.config.widths[-1]
        self.image_heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        hidden = scorer.text_encoder.config.hidden_size
        self.text_heads = nn.ModuleList(nn.Linear(hidden, size) for size in sizes)


def contrastive(similarity: Tensor, positive: Tensor) -> Tensor:
    """-log of the softmax mass on the positives of each row, mean over rows that have one.

    The multi-positive form of the InfoNCE loss (Miech et al. 2020, MIL-NCE).
    """
    log_mass = similarity.masked_fill(~positive, -torch.inf).logsumexp(-1)
    return (similarity.logsumexp(-1) - log_mass)[positive.any(-1)].mean()


def named_losses(
    heads: nn.ModuleList, x: Tensor, concept: Tensor, style: Tensor, colour: Tensor
) -> Tensor:
    """Cross-entropies of the three attributes; the last class stands for "not named"."""
    targets = (concept, style % (len(STYLES) + 1), colour % (len(COLOURS) + 1))
    terms = [
        F.cross_entropy(head(x), target, label_smoothing=0.1)
        for head, target in zip(heads, targets, strict=True)
    ]
    return terms[0] + 0.3 * terms[1] + 0.3 * terms[2]


def text_states(
    scorer: TextImageScorer, texts: list[str], g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Pooled states (B, D), and the states of one random position at or after each end token.

    The pipeline pads every prompt to the full length and shows all positions to the U-Net, so
    those after the end must carry the prompt too. Every fourth batch has the full length.
    """
    full = bool(torch.rand(1, generator=g) < 0.25)
    tokens = scorer.tokenizer(
        texts, padding="max_length" if full else True, truncation=True, return_tensors="pt"
    )
    output = scorer.text_encoder(tokens.input_ids)
    length = tokens.attention_mask.sum(-1)
    room = tokens.input_ids.shape[1] - length + 1
    position = length - 1 + (torch.rand(len(texts), generator=g) * room).long()
    states = output.last_hidden_state[torch.arange(len(texts)), position]
    return output.pooler_output, states


def caption_batch(
    writer: Writer, heldout: Tensor, seen: tuple[Tensor, Tensor, Tensor], g: torch.Generator
) -> Captions:
    """The caption of each picture, then one that is wrong in its style or its colour.

    Arguments:
        heldout: booleans (C, S); no wrong caption names such a pair.
        seen: concept, style and colour of each picture.
    """
    concept, style, colour = seen
    count = len(concept)
    other_style = (style + torch.randint(1, len(STYLES), (count,), generator=g)) % len(STYLES)
    other_colour = (colour + torch.randint(1, len(COLOURS), (count,), generator=g)) % len(COLOURS)
    restyle = (torch.rand(count, generator=g) < 0.5) & ~heldout[concept, other_style]
    wrong_style = torch.where(restyle, other_style, style)
    wrong_colour = torch.where(restyle, colour, other_colour)
    own = writer.write(concept, style, colour, g)
    hard = writer.write(concept, wrong_style, wrong_colour, g)
    return Captions(
        own.texts + hard.texts,
        torch.cat([own.phrase, hard.phrase]),
        torch.cat([own.concept, hard.concept]),
        torch.cat([own.style, hard.style]),
        torch.cat([own.colour, hard.colour]),
    )


def picture_batch(
    pictures: Pictures, weights: Tensor, shape: tuple[int, int], g: torch.Generator
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Augmented pictures, and the concept, style and colour (-1: unnamed) of each.

    Arguments:
        shape: number of pictures, and the edge they are shrunk to.
    """
    count, edge = shape
    pairs = weights.multinomial(count, replacement=True, generator=g)
    colour = torch.randint(len(PALETTE), (count,), generator=g)
    colour = colour.masked_fill(torch.rand(count, generator=g) < 0.1, -1)
    plain = torch.where(colour[:, None] < 0, torch.rand(count, 3, generator=g), PALETTE[colour])
    background = (plain + 0.02 * torch.randn(count, 3, generator=g)).clamp(0, 1)
    images = pictures.draw(pairs, background[..., None, None], GENTLE, g)
    if edge < SIZE:
        images = F.interpolate(images, edge, mode="bilinear", antialias=True)
    images = images.contiguous(memory_format=torch.channels_last)
    return images, (pairs // len(STYLES), pairs % len(STYLES), colour)


def train_step(
    players: Players,
    pictures: Pictures,
    writer: Writer,
    weights: Tensor,
    shape: tuple[int, int],
    g: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Contrastive and attribute losses of one batch, and how often the best picture fits."""
    scorer, tower = players.scorer, players.scorer.tower
    images, seen = picture_batch(pictures, weights, shape, g)
    said = caption_batch(writer, pictures.heldout, seen, g)
    features = tower.trunk.pooled(images)[-1]
    pooled, states = text_states(scorer, said.texts, g)
    text = F.normalize(tower.text_projection(pooled), dim=-1)
    image = F.normalize(tower.image_projection(features), dim=-1)
    similarity = tower.log_scale.exp().clamp_max(100) * text @ image.T
    # Whether a caption that names a colour fits a picture of an unnamed colour is not known.
    unknown = (said.colour[:, None] >= 0) & (seen[2] < 0)
    similarity = similarity.masked_fill(unknown, -1e4)
    positive = writer.matches(said, *seen)
    loss = contrastive(similarity, positive) + contrastive(similarity.T, positive.T)
    loss = loss + 0.5 * named_losses(players.image_heads, features, *seen)
    named = (said.concept, said.style, said.colour)
    for x in (pooled, states):
        loss = loss + 0.5 * named_losses(players.text_heads, x, *named)
    right = positive[: len(images)].gather(1, similarity[: len(images)].argmax(-1, keepdim=True))
    return loss, right.float().mean()


def caption(pictures: Pictures, concept: int, style: int, colour: int) -> str:
    """The full caption of one picture."""
    name = pictures.concepts[concept]["name"]
    return FULL.format(name=name, style=STYLES[style], colour=COLOURS[colour])


def choice(
    scorer: TextImageScorer, image: Tensor, options: list[list[str]], truth: Tensor
) -> float:
    """How often the true caption of a picture scores best among its options."""
    text = scorer.embed_texts([text for row in options for text in row])
    scores = (text.unflatten(0, (len(options), -1)) * image[:, None]).sum(-1)
    return share(scores.argmax(-1) == truth)


@torch.no_grad()
def evaluate(scorer: TextImageScorer, pictures: Pictures) -> dict[str, Any]:
    """Scores on held-out pictures, each over one palette colour.

    Retrieval: a caption's own picture is among the first 1 or 5 of all held-out pictures, or of
    all pictures of the shipped concepts. Choice: the true style (of 4) or colour (of 8) of a
    picture, all else in the caption being right.
    """
    styles, colours = range(len(STYLES)), range(len(COLOURS))
    shipped = torch.zeros_like(pictures.heldout)
    shipped[pictures.shipped] = True
    pairs = (shipped | pictures.heldout).flatten().nonzero()[:, 0]
    colour = torch.arange(len(pairs)) * 3 % len(COLOURS)
    rows = list(zip((pairs // 4).tolist(), (pairs % 4).tolist(), colour.tolist(), strict=True))
    images = pictures.plain(pairs, colour)
    image = torch.cat([scorer.embed_images(part) for part in images.split(128)])
    text = scorer.embed_texts([caption(pictures, *row) for row in rows])
    held = pictures.heldout.flatten()[pairs]
    similarity = text @ image.T
    rank_all = (similarity > similarity.diagonal()[:, None]).sum(-1)[held]
    among = similarity[held][:, held]
    rank = (among > among.diagonal()[:, None]).sum(-1)
    rows = [row for row, is_held in zip(rows, held.tolist(), strict=True) if is_held]
    by_style = [[caption(pictures, c, s, b) for s in styles] for c, _, b in rows]
    by_colour = [[caption(pictures, c, s, b) for b in colours] for c, s, _ in rows]
    return {
        "n": len(rows),
        "top1": share(rank < 1),
        "top5": share(rank < 5),
        "pool": len(pairs),
        "top1_in_pool": share(rank_all < 1),
        "top5_in_pool": share(rank_all < 5),
        "style_choice": choice(scorer, image[held], by_style, pairs[held] % len(STYLES)),
        "colour_choice": choice(scorer, image[held], by_colour, colour[held]),
    }


def build(writer: Writer) -> TextImageScorer:
    """An untrained scorer whose tokenizer knows the words of all captions."""
    names = [choice[0] for choice in writer.choices]
    keywords = [phrase for choice in writer.choices for phrase in choice[1:]]
    tokenizer = make_tokenizer(names, keywords)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        projection_dim=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return TextImageScorer(TextImageScorerConfig(), CLIPTextModel(config), tokenizer)


def main() -> None:
    parser = flags(__doc__, ".build/scorer", 24.0)
    parser.add_argument("--refine", action="store_true", help="train the image half alone")
    args = parser.parse_args()
    torch.manual_seed(args.seed + 2)
    pictures = Pictures(args.emoji)
    writer = Writer(pictures)
    players = Players(build(writer), len(pictures.concepts))
    players.scorer.tower.to(memory_format=torch.channels_last)
    weights, budget = pictures.weights(), Budget(args.minutes)

    def step(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        edge = SIZE if budget.progress > SMALL_SHARE else SIZE // 2
        return train_step(players, pictures, writer, weights, (args.batch, edge), generator)

    state = args.output.with_name(args.output.name + "-state") / "state.pt"
    if args.refine:
        players.load_state_dict(torch.load(state, weights_only=True)["modules"])
        players.scorer.text_encoder.requires_grad_(False)
        players.text_heads.requires_grad_(False)
        state = args.output.with_name(args.output.name + "-refined-state") / "state.pt"
    optimizers = [adamw(list(players.parameters()), 2e-3)]
    train(players, step, budget, state, optimizers, args.seed + args.refine)
    players.scorer.save(args.output, overwrite=True)
    result = evaluate(TextImageScorer.load(args.output), pictures)
    result |= {"seed": args.seed, "seconds": round(budget.elapsed), "steps": budget.step}
    result |= {"batch": args.batch, "threads": torch.get_num_threads(), "refined": args.refine}
    write_json(args.output / "metrics.json", result)
    print(result)


if __name__ == "__main__":
    main()
