"""Every drawing the course uses: names, groups, keywords, and 128 px pictures on white.

One concept ("red apple") is drawn by several hands (styles). Names, groups and keywords come from
emojibase; an icon belongs to a concept when its name is the slug of the concept's label.

`--pack FOLDER` writes what pretraining needs in a few megabytes. Put there as `build/drawings`, it
takes the place of the packages on a machine that cannot fetch them (a rented GPU, say).

    python data/build/drawings.py --pack build/pack
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import unicodedata
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from fetch import WORK, fetch, package_folder
from PIL import Image

SIZE = 128

# word in the caption -> icon package
BASE_STYLES = {
    "noto": "noto",
    "blob": "noto-v1",
    "twemoji": "twemoji",
    "classic": "emojione",
    "flat": "fluent-emoji-flat",
}
NEW_STYLES = {"ink": "fluent-emoji-high-contrast", "clay": "fluent-emoji"}
STYLES = BASE_STYLES | NEW_STYLES
# Other hands that draw the same things; only the judge looks at them, to know a thing in any style.
OTHER_HANDS = {
    "monotone": "emojione-monotone",
    "firefox": "fxemoji",
    "streamline": "streamline-emojis",
}
PACKAGE_OF = STYLES | OTHER_HANDS

# Letters, signs and flags teach a picture model little.
DROPPED_GROUPS = {"component", "symbols", "flags"}
PEOPLE = {
    "hand-fingers-open",
    "hand-fingers-partial",
    "hand-single-finger",
    "hand-fingers-closed",
    "hands",
    "hand-prop",
    "body-parts",
    "person",
    "person-fantasy",
}
DROPPED_WORDS = re.compile(
    r"o'clock|thirty|\b(man|woman|men|women|hair|beard|symbol|button|sign|speech|suit|oncoming"
    r"|pointing|gibbous|quarter|banknote|volume|japanese|envelope|inbox|outbox|mailbox|railway"
    r"|index|merperson)\b"
)
# Drawings that say little at 128 px, differ from a neighbour by a detail, or do not suit a class.
DROPPED = set(
    """zzz; hundred points; anger symbol; hole; dashing away; dizzy; right anger bubble;
    thought balloon; middle finger; cigarette; raised back of hand; hand with fingers splayed;
    vulcan salute; map of japan; tanabata tree; pine decoration; moon viewing ceremony;
    carp streamer; wind chime; prayer beads; postal horn; level slider; control knobs; pager;
    fax machine; trackball; computer disk; optical disk; dvd; videocassette; film frames;
    chart increasing with yen; ballot box with ballot; tear-off calendar; card file box;
    file cabinet; linked paperclips; locked with pen; locked with key; hammer and pick;
    mahjong red dragon; joker; flower playing cards; bookmark tabs; page with curl; green book;
    blue book; orange book; station; light rail; tram car; monorail; aerial tramway; train;
    metro; love hotel; derelict house; building construction; houses; convenience store;
    department store; kaaba; shinto shrine; synagogue; mosque; church; motorway; oil drum;
    construction; foggy; fog; national park; hot springs; barber pole; seat; cricket game;
    field hockey; martial arts uniform; goal net; kimono; clutch bag; rescue worker's helmet;
    musical score; mobile phone with arrow; telephone receiver; label; e-mail; postbox;
    black nib; file folder; open file folder; clipboard; round pushpin; nut and bolt; clamp;
    link; chains; coffin; funeral urn; skull and crossbones; oden; rice cracker; amphora;
    sake; teacup without handle; fish cake with swirl; heart exclamation; heart decoration;
    globe with meridians; globe showing asia-australia; bell with slash; umbrella on ground;
    sun behind small cloud; sun behind large cloud; confounded face; frowning face with open mouth;
    mrs. claus; baby angel; reminder ribbon; admission tickets; crossed fingers; tumbler glass;
    military medal; sports medal; front-facing baby chick; two-hump camel; notebook; ledger;
    page facing up; rolled-up newspaper; camera with flash; bookmark""".split(";")
)
DROPPED = {" ".join(name.split()) for name in DROPPED}
# Things everybody can judge at a glance: pretraining sees them more often, validation prefers them.
COMMON = set(
    """grinning face; smiling face with smiling eyes; smiling face with sunglasses; winking face;
    smiling face with heart-eyes; angry face; crying face; sleeping face; thinking face;
    face with tears of joy; smiling face; face with tongue; skull; ghost; alien; robot; clown face;
    pile of poo; jack-o-lantern; red heart; blue heart; broken heart; thumbs up; waving hand; eye;
    cat face; dog face; fox; lion; tiger face; horse face; unicorn; cow face; pig face; mouse face;
    rabbit face; bear; panda; koala; frog; monkey face; wolf; hamster; elephant; penguin; owl;
    duck; chicken; baby chick; turtle; snake; whale; dolphin; fish; tropical fish; shark; octopus;
    crab; snail; butterfly; honeybee; lady beetle; spider; bat; rose; sunflower; tulip; blossom;
    cherry blossom; evergreen tree; deciduous tree; palm tree; cactus; four leaf clover; mushroom;
    maple leaf; grapes; watermelon; tangerine; lemon; banana; pineapple; red apple; green apple;
    pear; peach; cherries; strawberry; tomato; eggplant; carrot; ear of corn; hot pepper; bread;
    croissant; cheese wedge; hamburger; french fries; pizza; hot dog; taco; egg; cooking; popcorn;
    sushi; ice cream; soft ice cream; doughnut; cookie; birthday cake; shortcake; lollipop; candy;
    hot beverage; wine glass; beer mug; cocktail glass; glass of milk; volcano; mountain; house;
    castle; tent; desert island; rainbow; sun; sun with face; crescent moon; star; cloud;
    cloud with rain; snowflake; snowman; fire; droplet; umbrella; high voltage; locomotive; bus;
    ambulance; fire engine; police car; taxi; automobile; delivery truck; tractor; racing car;
    motorcycle; bicycle; sailboat; airplane; helicopter; rocket; anchor; balloon; wrapped gift;
    christmas tree; trophy; soccer ball; basketball; tennis; baseball; guitar; violin; trumpet;
    drum; camera; television; laptop; mobile phone; light bulb; candle; closed book; books; key;
    hammer; scissors; pencil; magnifying glass tilted left; bell; crown; top hat; t-shirt; glasses;
    sunglasses; gem stone; ring; backpack; running shoe; alarm clock; watch; hourglass done;
    globe showing americas; money bag; bomb; artist palette; game die; video game; syringe; pill;
    telescope; shield; gear; hatching chick; bouquet; cloud with lightning""".split(";")
)
COMMON = {" ".join(name.split()) for name in COMMON}


@dataclass(frozen=True)
class Concept:
    """One thing that can be drawn: its plain name, its place in emojibase, its keywords."""

    name: str  # lower case ASCII, as it stands in a caption: "smiling face with heart-eyes"
    slug: str  # as icon packages name it: "smiling-face-with-heart-eyes"
    group: str
    subgroup: str
    keywords: tuple[str, ...]


def plain(label: str) -> str:
    """Lower case without accents or typographic quotes."""
    label = label.replace("\u2019", "'").replace("\u201c", "").replace("\u201d", "")
    text = unicodedata.normalize("NFKD", label.lower())
    return "".join(c for c in text if not unicodedata.combining(c))


def slug(label: str) -> str:
    """The icon name of a label."""
    return re.sub(r"[^a-z0-9]+", "-", plain(label).replace("'", "")).strip("-")


def share(name: str, salt: str) -> float:
    """A number in [0, 1) that depends on the name only: every split is drawn with it."""
    digest = hashlib.sha256(f"{salt}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@cache
def concepts(work: Path = WORK) -> dict[str, Concept]:
    """All concepts by slug, without flags and skin tones, in emojibase's order."""
    packed = work / "drawings" / "concepts.json"
    if packed.exists():
        entries = json.loads(packed.read_text())
        return {e["slug"]: Concept(**e | {"keywords": tuple(e["keywords"])}) for e in entries}
    folder = package_folder("emojibase-data", work) / "package"
    entries = json.loads((folder / "en" / "data.json").read_text())
    meta = json.loads((folder / "meta" / "groups.json").read_text())
    found = {}
    for entry in sorted(entries, key=lambda e: e.get("order", 10**6)):
        if "group" not in entry:  # single letters of flags
            continue
        concept = Concept(
            name=plain(entry["label"]),
            slug=slug(entry["label"]),
            group=meta["groups"][str(entry["group"])],
            subgroup=meta["subgroups"][str(entry["subgroup"])],
            keywords=tuple(plain(tag) for tag in entry.get("tags", ())),
        )
        if concept.group not in ("component", "flags"):
            found[concept.slug] = concept
    return found


@cache
def icons(style: str, work: Path = WORK) -> dict:
    """The icon file of a style."""
    path = package_folder(f"@iconify-json/{PACKAGE_OF[style]}", work) / "package" / "icons.json"
    return json.loads(path.read_text())


def icon_of(style: str, concept: str, work: Path = WORK) -> dict | None:
    """The icon that draws a concept in a style, or None; aliases that mirror are left out."""
    book = icons(style, work)
    alias = book.get("aliases", {}).get(concept)
    if alias is not None and set(alias) == {"parent"}:
        concept = alias["parent"]
    if style == "firefox":  # its names have no hyphens
        concept = concept.replace("-", "")
    return book["icons"].get(concept)


@cache
def drawn(style: str, work: Path = WORK) -> frozenset[str]:
    """The concepts that a style draws."""
    names = work / "drawings" / f"{style}.json"
    if names.exists():
        return frozenset(json.loads(names.read_text()))
    return frozenset(key for key in concepts(work) if icon_of(style, key, work) is not None)


def render(style: str, concept: str, size: int = SIZE, work: Path = WORK) -> Image.Image:
    """Draw one concept: RGB, `size` x `size`, on white; a drawing that is not square is centred."""
    import resvg_py  # only this function needs it, and a GPU machine has packed drawings instead

    book, icon = icons(style, work), icon_of(style, concept, work)
    if icon is None:
        raise KeyError(f"{style} does not draw {concept}")
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", book.get("width", 16))
    height = icon.get("height", book.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">'
        f"{icon['body']}</svg>"
    )
    # System fonts would make the bytes depend on the machine.
    fit = {"width": size} if width >= height else {"height": size}
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True, **fit)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    if drawing.size == (size, size):
        return drawing
    page = Image.new("RGB", (size, size), "white")
    page.paste(drawing, ((size - drawing.width) // 2, (size - drawing.height) // 2))
    return page


def held_out(concept: str) -> bool:
    """About 5 % of all concepts are never trained on, in any style, by any model."""
    return share(concept, "held-out") < 0.05


@cache
def good_concepts(work: Path = WORK) -> tuple[str, ...]:
    """The concepts of the course: clear single things that at least four base styles draw."""
    chosen = []
    for key, concept in concepts(work).items():
        if concept.group in DROPPED_GROUPS or concept.name in DROPPED:
            continue
        if DROPPED_WORDS.search(concept.name):
            continue
        if concept.group == "people-body" and concept.subgroup not in PEOPLE:
            continue
        if sum(key in drawn(style, work) for style in BASE_STYLES) >= 4:
            chosen.append(key)
    return tuple(chosen)


def load_style(style: str, work: Path = WORK) -> tuple[list[str], np.ndarray]:
    """All drawings of a style as (concepts, uint8 array N x 128 x 128 x 3), rendered once."""
    store, names = work / "drawings" / f"{style}.npy", work / "drawings" / f"{style}.json"
    if not (store.exists() and names.exists()):
        store.parent.mkdir(parents=True, exist_ok=True)
        if store.with_suffix(".webp").exists():
            keys = json.loads(names.read_text())
            array = unpack(Image.open(store.with_suffix(".webp")), len(keys))
        else:
            keys = [key for key in concepts(work) if key in drawn(style, work)]
            array = np.stack([np.asarray(render(style, key, work=work)) for key in keys])
        np.save(store, array)
        names.write_text(json.dumps(keys))
    return json.loads(names.read_text()), np.load(store, mmap_mode="r")


COLUMNS = 32


def pack(folder: Path, work: Path = WORK) -> None:
    """Write concepts and every drawing that training shows, one lossless WebP and one list per style."""
    folder.mkdir(parents=True, exist_ok=True)
    book = concepts(work)
    (folder / "concepts.json").write_text(json.dumps([asdict(c) for c in book.values()]))
    things = {key for key in book if book[key].group not in DROPPED_GROUPS}
    for style in PACKAGE_OF:
        keys, array = load_style(style, work)
        shown = things if style in STYLES else set(good_concepts(work))
        rows = [i for i, key in enumerate(keys) if key in shown]
        page = np.full((-(-len(rows) // COLUMNS), SIZE, COLUMNS, SIZE, 3), 255, np.uint8)
        for place, i in enumerate(rows):
            page[place // COLUMNS, :, place % COLUMNS] = array[i]
        sheet = Image.fromarray(page.reshape(-1, COLUMNS * SIZE, 3))
        sheet.save(folder / f"{style}.webp", lossless=True)
        (folder / f"{style}.json").write_text(json.dumps([keys[i] for i in rows]))


def unpack(sheet: Image.Image, count: int) -> np.ndarray:
    """The drawings of one packed picture, N x 128 x 128 x 3."""
    page = np.asarray(sheet).reshape(-1, SIZE, COLUMNS, SIZE, 3).swapaxes(1, 2)
    return page.reshape(-1, SIZE, SIZE, 3)[:count]


def fetch_all() -> None:
    """Make sure that every package is there and is the pinned one."""
    for style in PACKAGE_OF.values():
        fetch(f"@iconify-json/{style}")
    fetch("emojibase-data")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pack", type=Path, help="folder for the packed drawings")
    args = parser.parse_args()
    fetch_all()
    for style in PACKAGE_OF:
        keys, pictures = load_style(style)
        print(f"{style:8s} {len(keys)} drawings, {pictures.shape[1:]}")
    good = good_concepts()
    print(f"{len(good)} good concepts, {sum(map(held_out, good))} of them held out everywhere")
    if args.pack:
        pack(args.pack)


if __name__ == "__main__":
    main()
