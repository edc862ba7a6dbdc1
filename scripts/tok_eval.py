"""
Compare the compression of the tokenizer with that of GPT-2's and GPT-4's, in bytes per token (more is better).

    python -m scripts.tok_eval
    TIKTOKEN_CACHE_DIR=~/.cache/tiktoken python -m scripts.tok_eval     # tiktoken's files of the other two
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import tiktoken
from rich.console import Console
from rich.table import Table

from nanochat import dataset
from nanochat.cli import command, flag
from nanochat.common import UserError
from nanochat.tokenizer import Tokenizer, bytes_per_token, default_dir

OTHERS = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}  # shown name → tiktoken's name
NUM_DOCS = 100  # documents of each split (heuristic, not tuned)


@dataclass(frozen=True)
class Flags:
    data_dir: str = flag("", "folder of parquet shards; empty = $NANOCHAT_DATA_DIR or the default")
    tokenizer_dir: str = flag("", "folder of the tokenizer; empty = tokenizer/ in $NANOCHAT_BASE_DIR")


@command
def main(flags: Flags) -> dict[str, dict[str, float]]:
    """Prints the table, and returns kind of text → tokenizer → bytes per token."""
    ours = Tokenizer.load(Path(flags.tokenizer_dir) if flags.tokenizer_dir else default_dir())
    encoders = {"ours": ours.encode}
    sizes = {"ours": ours.vocab_size}
    for name, tiktoken_name in OTHERS.items():
        encoding = local_encoding(tiktoken_name)
        if encoding is None:
            print(f"{name}: skipped, tiktoken has no local copy of {tiktoken_name} (see $TIKTOKEN_CACHE_DIR)")
        else:
            encoders[name] = encoding.encode_ordinary
            sizes[name] = encoding.n_vocab

    samples = {kind: [text] for kind, text in SAMPLES.items()}
    samples |= split_samples(flags.data_dir)
    results = {}
    for kind, texts in samples.items():
        results[kind] = {name: bytes_per_token(encode, texts) for name, encode in encoders.items()}
    print_table(results, sizes)
    return results


def local_encoding(name: str) -> tiktoken.Encoding | None:
    """tiktoken's encoding of that name, or None if its files are not on this machine. Never downloads them."""
    with mock.patch("tiktoken.load.read_file", side_effect=FileNotFoundError):
        try:
            return tiktoken.get_encoding(name)
        except FileNotFoundError:
            return None


def split_samples(data_dir: str) -> dict[str, list[str]]:
    """The first documents of the training and validation splits; empty if there are no shards."""
    try:
        train_shards, val_shards = dataset.split_shards(dataset.resolve_data_dir(data_dir))
    except UserError as error:
        if data_dir:
            raise  # the user named this folder
        print(f"train and val split: skipped, {error}")
        return {}
    splits = {"train split": train_shards, "val split": val_shards}
    return {name: list(itertools.islice(dataset.iterate_texts(shards), NUM_DOCS)) for name, shards in splits.items()}


def print_table(results: dict[str, dict[str, float]], sizes: dict[str, int]) -> None:
    table = Table("text", title="bytes per token")
    for name, size in sizes.items():
        table.add_column(f"{name}\n{size:,} tokens", justify="right")
    for kind, ratios in results.items():
        best = max(ratios.values())
        cells = [f"[bold]{ratio:.2f}[/bold]" if ratio == best else f"{ratio:.2f}" for ratio in ratios.values()]
        table.add_row(kind, *cells)
    Console().print(table)


# Kind → text, written for this comparison.
SAMPLES = {
    "news": """\
The city council voted 7 to 4 on Tuesday night to close the harbour bridge for eighteen months, ending a dispute
that had divided shopkeepers, commuters and engineers since inspectors found cracks in two of its main girders
last spring. Repairs are expected to cost $212 million, a third more than was estimated in March, and the
mayor's office said that ferries will run every ten minutes at peak hours while the work goes on. "Nobody likes
this decision, but nobody offered a better one," said Councilwoman Teresa Whitlock, who had asked for a second
opinion before changing her vote. Business owners along Quay Street, where the bridge brings in most of the
weekend's visitors, said they would seek compensation. A spokesman declined to say how many jobs might be lost.
The first lane should reopen before the winter of next year, weather permitting.
""",
    "code": '''\
import heapq
from collections import defaultdict


def shortest_paths(edges: list[tuple[str, str, float]], source: str) -> dict[str, float]:
    """Dijkstra's algorithm: distance from source to every node it can reach."""
    neighbours = defaultdict(list)
    for start, end, weight in edges:
        if weight < 0:
            raise ValueError(f"negative weight {weight} between {start} and {end}")
        neighbours[start].append((end, weight))
    distance = {}
    queue = [(0.0, source)]
    while queue:
        so_far, node = heapq.heappop(queue)
        if node in distance:
            continue
        distance[node] = so_far
        for neighbour, weight in neighbours[node]:
            if neighbour not in distance:
                heapq.heappush(queue, (so_far + weight, neighbour))
    return distance
''',
    "Korean": """\
어제 저녁부터 내리기 시작한 비가 오늘 아침까지 이어지면서 강가의 산책로가 모두 물에 잠겼다. 시청은
주민들에게 다리 근처로 가지 말라고 당부했고, 학교 세 곳은 수업을 오후로 미루었다. 시장에서 채소를
파는 김 씨는 "이렇게 많은 비는 십 년 만에 처음 본다"고 말했다. 기상청은 내일 낮부터 구름이 걷히고
기온이 조금씩 오를 것으로 내다보았다. 도서관과 체육관은 집에 돌아가지 못한 사람들을 위해 밤새 문을
열어 두기로 했다.
""",
    "maths": r"""
\begin{lemma} Let $(a_n)_{n \ge 1}$ be a decreasing sequence of positive real numbers with
$\sum_{n=1}^{\infty} a_n < \infty$. Then $\lim_{n \to \infty} n a_n = 0$. \end{lemma}
\begin{proof} Given $\varepsilon > 0$, choose $N$ such that $\sum_{k=N+1}^{\infty} a_k < \varepsilon / 2$. For every
$n > 2N$ the terms $a_{\lceil n/2 \rceil}, \dots, a_n$ are at least $a_n$, and hence
\[ \frac{n}{2} \, a_n \le \sum_{k=\lceil n/2 \rceil}^{n} a_k \le \sum_{k=N+1}^{\infty} a_k < \frac{\varepsilon}{2} . \]
Therefore $0 \le n a_n < \varepsilon$. The converse fails: take $a_n = 1 / (n \log (n + 1))$. \end{proof}
For instance $3{,}456 \times 0.125 = 432$, $\sqrt{2} \approx 1.41421356$ and $e^{i\pi} + 1 = 0$.
""",
}


if __name__ == "__main__":
    main()
