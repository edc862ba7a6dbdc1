"""
The primer: a small generated corpus, so that every stage can run on a laptop in minutes without a network.

It is a children's encyclopaedia in plain English with sums and spelling:

    generate_documents()       pretraining text; write_shards() writes it as parquet shards
    generate_conversations()   fine-tuning conversations
    generate_quiz()            evaluation: questions about the same facts in wordings that do not occur in training
    generate_sums()            reinforcement learning and evaluation: sums; those of the test split have unseen numbers

A model of a few million parameters learns these facts, so it shows whether a short run has worked. The texts depend on
the seed only. The facts are in facts.txt, their wordings in wordings.txt.
"""

from nanochat.primer.conversations import CONVERSATION_MIX, generate_conversations
from nanochat.primer.documents import generate_documents, write_shards
from nanochat.primer.facts import SPELLING_WORDS
from nanochat.primer.questions import generate_quiz
from nanochat.primer.relations import all_facts, contains_phrase
from nanochat.primer.sums import generate_sums

__all__ = [
    "CONVERSATION_MIX", "SPELLING_WORDS", "all_facts", "contains_phrase", "generate_conversations",
    "generate_documents", "generate_quiz", "generate_sums", "write_shards",
]  # fmt: skip
