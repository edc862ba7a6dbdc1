//! Learns the merges: the most frequent pair of neighbouring tokens becomes a new token, repeatedly. Of equally
//! frequent pairs, the one with the smaller ids is taken.
//!
//! All chunks are in one array with a slot per byte. A token stores its id in its first and its last slot, so that the
//! neighbour on either side is found by an addition, and a merge moves nothing:
//!
//! ```text
//! "low" + "lower" as bytes   | l o w | l o w e r |
//! after l o → 256            | 256 256 w | 256 256 w e r |
//! after 256 w → 257          | 257 - 257 | 257 - 257 e r |
//! ```
//!
//! A pair enters the queue once, when the newer of its tokens is created, with its count and its positions. Later
//! merges remove some of these positions and never add any, so a count in the queue can be too high but not too low.
//! Therefore the pair at the top is recounted, and goes back into the queue if its count was too high. No table from
//! pairs to counts is needed, and the work is proportional to the number of positions.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::count::Words;

pub type Pair = (u32, u32);

#[derive(Debug, PartialEq, Eq)]
pub enum Stopped {
    /// The progress callback returned false.
    ByCallback,
    /// The distinct chunks together have more bytes than 32-bit positions can number.
    TooLarge,
}

const BOUNDARY: u32 = u32::MAX; // between two chunks
const DEAD: u32 = u32::MAX - 1; // inside a token, where another one started before a merge
const REPORT_EVERY: Duration = Duration::from_millis(20);

/// The merges in order: the i-th makes token 256 + i out of two older ones. There are fewer than vocab_size - 256 if no
/// pair is left. `progress(done, total)` is called every 20 ms and stops the training by returning false.
pub fn train(
    words: &Words,
    vocab_size: usize,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Vec<Pair>, Stopped> {
    let mut merger = Merger::new(words)?;
    let mut merges = Vec::new();
    let total = vocab_size.saturating_sub(256);
    let mut reported = Instant::now();
    while merges.len() < total {
        let Some((pair, positions)) = merger.most_frequent() else { break };
        merger.merge(pair, positions);
        merges.push(pair);
        if reported.elapsed() >= REPORT_EVERY {
            if !progress(merges.len(), total) {
                return Err(Stopped::ByCallback);
            }
            reported = Instant::now();
        }
    }
    Ok(merges)
}

/// The bytes of each token, by id: the 256 single bytes, then the results of the merges.
pub fn tokens_of(merges: &[Pair]) -> Vec<Vec<u8>> {
    let mut tokens: Vec<Vec<u8>> = (0..=u8::MAX).map(|byte| vec![byte]).collect();
    for &(first, second) in merges {
        tokens.push([&*tokens[first as usize], &*tokens[second as usize]].concat());
    }
    tokens
}

#[derive(Clone, Copy)]
struct Slot {
    token: u32,
    word: u32,
}

struct Merger<'a> {
    slots: Vec<Slot>,
    counts: &'a [u64],   // by word
    lengths: Vec<u32>,   // by token, in bytes
    positions: Vec<u32>, // slots where pairs start; each pair has a range of this, ascending
    queue: Queue,
    before: Neighbours, // scratch space of merge()
    after: Neighbours,
}

impl<'a> Merger<'a> {
    fn new(words: &'a Words) -> Result<Self, Stopped> {
        if words.bytes.len() + words.ends.len() >= DEAD as usize {
            return Err(Stopped::TooLarge);
        }
        let boundary = Slot { token: BOUNDARY, word: 0 };
        let mut slots = Vec::with_capacity(words.bytes.len() + words.ends.len() + 1);
        slots.push(boundary);
        let mut start = 0;
        for (word, &end) in (0..).zip(&words.ends) {
            slots.extend(words.bytes[start..end].iter().map(|&byte| Slot { token: byte.into(), word }));
            slots.push(boundary);
            start = end;
        }
        let mut merger = Self {
            slots,
            counts: &words.counts,
            lengths: vec![1; 256],
            positions: Vec::new(),
            queue: Queue::default(),
            before: Neighbours::default(),
            after: Neighbours::default(),
        };
        merger.queue_pairs_of_bytes();
        Ok(merger)
    }

    fn queue_pairs_of_bytes(&mut self) {
        let mut pairs = Neighbours::default(); // of numbers that stand for pairs, instead of neighbours
        for (position, pair) in (0..).zip(self.slots.windows(2)) {
            if pair[0].token < 256 && pair[1].token < 256 {
                let number = pair[0].token << 8 | pair[1].token;
                pairs.add(number, position, self.counts[pair[0].word as usize]);
            }
        }
        pairs.queue(&mut self.positions, &mut self.queue, |number| (number >> 8, number & 255));
    }

    /// The next pair to merge, and the range of its positions.
    fn most_frequent(&mut self) -> Option<(Pair, Range<usize>)> {
        while let Some(top) = self.queue.pop() {
            let Reverse(pair) = top.pair;
            let (count, positions) = self.recount(pair, top.positions());
            if count == top.count {
                return Some((pair, positions));
            }
            if count > 0 {
                self.queue.push(Queued::new(count, pair, &positions));
            }
        }
        None
    }

    /// The current count of a pair. Positions that are still valid move to the front of the range; returns the count
    /// and the range that they fill.
    fn recount(&mut self, (first, second): Pair, range: Range<usize>) -> (u64, Range<usize>) {
        let step = self.lengths[first as usize] as usize;
        let (mut count, mut kept) = (0, range.start);
        for i in range.clone() {
            let position = self.positions[i];
            let slot = self.slots[position as usize];
            if slot.token == first && self.slots[position as usize + step].token == second {
                count += self.counts[slot.word as usize];
                self.positions[kept] = position;
                kept += 1;
            }
        }
        (count, range.start..kept)
    }

    /// Replaces the pair by a new token at all positions, and queues the pairs of the new token with its neighbours.
    fn merge(&mut self, (first, second): Pair, range: Range<usize>) {
        let new = self.lengths.len() as u32;
        let step = self.lengths[first as usize];
        let length = step + self.lengths[second as usize];
        self.lengths.push(length);

        let mut made = range.start; // positions that become the new token move to the front
        for i in range.clone() {
            let position = self.positions[i] as usize;
            let middle = position + step as usize;
            // In a run such as "aaa", the previous pair may have used this token already.
            if self.slots[position].token == first && self.slots[middle].token == second {
                self.slots[position].token = new;
                self.slots[middle].token = DEAD;
                self.slots[position + length as usize - 1].token = new;
                self.positions[made] = position as u32;
                made += 1;
            }
        }
        for i in range.start..made {
            let position = self.positions[i];
            let slot = self.slots[position as usize];
            let count = self.counts[slot.word as usize];
            let before = self.slots[position as usize - 1].token;
            let after = self.slots[(position + length) as usize].token;
            if before != BOUNDARY {
                self.before.add(before, position - self.lengths[before as usize], count);
            }
            if after != BOUNDARY && after != new {
                self.after.add(after, position, count); // two new tokens in a row are counted as `before`
            }
        }
        self.before.queue(&mut self.positions, &mut self.queue, |before| (before, new));
        self.after.queue(&mut self.positions, &mut self.queue, |after| (new, after));
    }
}

/// The neighbours found on one side of a new token: their counts, and where the pairs start.
#[derive(Default)]
struct Neighbours {
    found: Vec<(u32, u32)>, // neighbour, position
    different: Vec<u32>,
    totals: Vec<Total>, // by neighbour
}

#[derive(Clone, Copy, Default)]
struct Total {
    count: u64,
    positions: u32,
    cursor: usize,
}

impl Neighbours {
    #[inline]
    fn add(&mut self, neighbour: u32, position: u32, count: u64) {
        if self.totals.len() <= neighbour as usize {
            self.totals.resize(neighbour as usize + 1, Total::default());
        }
        let total = &mut self.totals[neighbour as usize];
        if total.positions == 0 {
            self.different.push(neighbour);
        }
        total.positions += 1;
        total.count += count;
        self.found.push((neighbour, position));
    }

    /// Queues a pair for each neighbour, appends the positions grouped by pair, and clears itself.
    fn queue(&mut self, positions: &mut Vec<u32>, queue: &mut Queue, pair: impl Fn(u32) -> Pair) {
        let mut end = positions.len();
        for &neighbour in &self.different {
            let total = &mut self.totals[neighbour as usize];
            total.cursor = end;
            end += total.positions as usize;
            queue.push(Queued::new(total.count, pair(neighbour), &(total.cursor..end)));
        }
        positions.resize(end, 0);
        for (neighbour, position) in self.found.drain(..) {
            let cursor = &mut self.totals[neighbour as usize].cursor;
            positions[*cursor] = position;
            *cursor += 1;
        }
        for neighbour in self.different.drain(..) {
            self.totals[neighbour as usize] = Total::default();
        }
    }
}

/// A pair in the queue. The greatest is merged next: the most frequent, and of equals the one with the smaller ids.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Queued {
    count: u64,
    pair: Reverse<Pair>,
    start: usize,
    num_positions: u32,
}

impl Queued {
    fn new(count: u64, pair: Pair, positions: &Range<usize>) -> Self {
        Self { count, pair: Reverse(pair), start: positions.start, num_positions: positions.len() as u32 }
    }

    fn positions(&self) -> Range<usize> {
        self.start..self.start + self.num_positions as usize
    }
}

/// A priority queue that orders only its top. Pairs whose count has fewer bits than that of the top are kept in plain
/// lists, and most pairs, the rare ones, are never sorted.
struct Queue {
    top: BinaryHeap<Queued>,
    rest: Vec<Vec<Queued>>, // by the number of bits of the count; those of rest.len() bits and more are in `top`
}

impl Default for Queue {
    fn default() -> Self {
        Self { top: BinaryHeap::new(), rest: (0..=u64::BITS).map(|_| Vec::new()).collect() }
    }
}

impl Queue {
    fn push(&mut self, queued: Queued) {
        let bits = (u64::BITS - queued.count.leading_zeros()) as usize;
        match self.rest.get_mut(bits) {
            Some(list) => list.push(queued),
            None => self.top.push(queued),
        }
    }

    fn pop(&mut self) -> Option<Queued> {
        while self.top.is_empty() {
            self.top = self.rest.pop()?.into();
        }
        self.top.pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// Counts all pairs again for each merge.
    fn train_slowly(words: &[(&[u8], u64)], vocab_size: usize) -> Vec<Pair> {
        let as_tokens = |&(bytes, count): &(&[u8], u64)| (bytes.iter().map(|&byte| byte.into()).collect(), count);
        let mut words: Vec<(Vec<u32>, u64)> = words.iter().map(as_tokens).collect();
        let mut merges = Vec::new();
        while merges.len() + 256 < vocab_size {
            let mut counts = HashMap::new();
            for (tokens, count) in &words {
                for pair in tokens.windows(2) {
                    *counts.entry((pair[0], pair[1])).or_insert(0) += count;
                }
            }
            let best = counts.iter().max_by_key(|&(&pair, count)| (count, Reverse(pair)));
            let Some((&pair, _)) = best else { break };
            for (tokens, _) in &mut words {
                let mut at = 0;
                while at + 1 < tokens.len() {
                    if (tokens[at], tokens[at + 1]) == pair {
                        tokens.splice(at..at + 2, [256 + merges.len() as u32]);
                    }
                    at += 1;
                }
            }
            merges.push(pair);
        }
        merges
    }

    fn train_fast(words: &[(&[u8], u64)], vocab_size: usize) -> Vec<Pair> {
        let mut input = Words::default();
        for (bytes, count) in words {
            input.push(bytes, *count);
        }
        train(&input, vocab_size, &mut |_, _| true).unwrap()
    }

    #[test]
    fn most_frequent_pair_is_first_and_of_equals_the_smaller() {
        let words: [(&[u8], u64); 3] = [(b"bc", 5), (b"ab", 5), (b"abab", 1)];
        assert_eq!(train_fast(&words, 258), [(97, 98), (98, 99)]);
        assert_eq!(train_fast(&words, 1000).len(), 3); // abab is one token then
    }

    #[test]
    fn runs_are_merged_from_the_left_and_counted_with_overlaps() {
        let words: [(&[u8], u64); 3] = [(b"aaa", 2), (b"aaaaaaa", 3), (b"ba", 21)];
        assert_eq!(train_fast(&words, 400), train_slowly(&words, 400));
        assert_eq!(train_fast(&words, 257), [(97, 97)]); // 2·2 + 3·6 = 22 > 21
    }

    #[test]
    fn counts_have_64_bits() {
        let words: [(&[u8], u64); 3] = [(b"ab", u64::MAX / 2), (b"abc", 1 << 40), (b"bc", u64::MAX / 4)];
        assert_eq!(train_fast(&words, 258), [(97, 98), (98, 99)]);
    }

    #[test]
    fn merges_equal_counting_again_for_each_merge() {
        let mut state = 1u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for letters in [1, 2, 3, 8] {
            for _ in 0..20 {
                let texts: Vec<(Vec<u8>, u64)> = (0..30)
                    .map(|_| ((0..random(20) + 2).map(|_| b'a' + random(letters) as u8).collect(), random(4) + 1))
                    .collect();
                let words: Vec<(&[u8], u64)> = texts.iter().map(|(text, count)| (text.as_slice(), *count)).collect();
                assert_eq!(train_fast(&words, 400), train_slowly(&words, 400));
            }
        }
    }

    #[test]
    fn callback_can_stop_training() {
        let long: Vec<u8> = (0..300_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let mut words = Words::default();
        words.push(&long, 1);
        assert_eq!(train(&words, 100_000, &mut |_, _| false), Err(Stopped::ByCallback));
    }
}
