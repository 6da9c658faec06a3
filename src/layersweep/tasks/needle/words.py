"""The wording of a trial, and the words that keys are made of: ``adjective-noun``, 4096 in all."""

# RULER (Hsieh et al. 2024), niah_single: template, needle, question and answer prefix.
INTRO = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n"
)
NEEDLE = "One of the special magic numbers for {key} is: {value}."
QUESTION = "\nWhat is the special magic number for {key} mentioned in the provided text?"
ANSWER_PREFIX = " The special magic number for {key} mentioned in the provided text is"
ANSWER = " {value}"

ADJECTIVES: tuple[str, ...] = (
    "amber", "ancient", "bitter", "bold", "brave", "bright", "calm", "clever",
    "cold", "copper", "crimson", "curious", "dark", "distant", "dusty", "eager",
    "early", "empty", "faint", "famous", "fierce", "flat", "fresh", "gentle",
    "golden", "grand", "grave", "green", "happy", "hidden", "hollow", "humble",
    "idle", "iron", "jolly", "keen", "large", "late", "lean", "little",
    "lonely", "loud", "lucky", "mellow", "mild", "narrow", "noble", "old",
    "pale", "plain", "proud", "quick", "quiet", "rapid", "rough", "round",
    "sharp", "silent", "slow", "solid", "steep", "stern", "sweet", "young",
)  # fmt: skip

NOUNS: tuple[str, ...] = (
    "acorn", "anchor", "apple", "arrow", "badger", "basket", "beacon", "bell",
    "bottle", "branch", "bridge", "butter", "button", "cabin", "camel", "candle",
    "canyon", "castle", "cherry", "cloud", "comet", "compass", "coral", "crane",
    "desert", "dragon", "eagle", "engine", "falcon", "feather", "fiddle", "forest",
    "garden", "glacier", "hammer", "harbor", "island", "jacket", "kettle", "ladder",
    "lantern", "lemon", "lizard", "marble", "meadow", "mirror", "mountain", "needle",
    "ocean", "orchard", "otter", "paper", "pebble", "pepper", "pickle", "planet",
    "rabbit", "ribbon", "river", "saddle", "shadow", "tiger", "valley", "window",
)  # fmt: skip
