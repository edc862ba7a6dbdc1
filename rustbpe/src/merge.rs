//! Learns the merges: the most frequent pair of neighbouring tokens becomes a new token, again and again; of equally
//! frequent pairs the one with the smaller ids.
//!
//! All chunks lie in one array with a slot per byte. A token shows its id in its first and in its last slot, so that a
//! step to either neighbour is an addition and merging moves nothing:
//!
//! ```text
//! "low" + "lower" as bytes   | l o w | l o w e r |
//! after l o → 256            | 256 256 w | 256 256 w e r |
//! after 256 w → 257          | 257 - 257 | 257 - 257 e r |
//! ```
//!
//! A pair is queued once, when the younger of its tokens is made, with its count and the places where it stands. Later
//! merges take places away from it and never add any, so a count in the queue may be too high but not too low: the pair
//! at the top is counted again, and goes back with the right count if that is lower. No table from pairs to counts is
//! needed, and the work is in proportion to the places.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::count::Words;

pub type Pair = (u32, u32);

#[derive(Debug, PartialEq, Eq)]
pub enum Stopped {
    /// The progress callback said so.
    Asked,
    /// The different chunks together have more bytes than places can be numbered.
    TooLarge,
}

const BOUNDARY: u32 = u32::MAX; // between two chunks
const DEAD: u32 = u32::MAX - 1; // inside of a token, where another one once began
const REPORT_EVERY: Duration = Duration::from_millis(20);

/// The merges in order: the i-th makes token 256 + i out of two older ones. Fewer than asked for when no pair is left.
/// `progress(done, total)` is called every few milliseconds; training stops when it says false.
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
        let Some((pair, places)) = merger.most_frequent() else { break };
        merger.merge(pair, places);
        merges.push(pair);
        if reported.elapsed() >= REPORT_EVERY {
            if !progress(merges.len(), total) {
                return Err(Stopped::Asked);
            }
            reported = Instant::now();
        }
    }
    Ok(merges)
}

/// The bytes of each token, by id: the 256 single bytes, then what the merges make.
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
    counts: &'a [u64], // by word
    lengths: Vec<u32>, // by token, in bytes
    places: Vec<u32>,  // the slots where pairs begin; each pair has a range of it, ascending
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
            places: Vec::new(),
            queue: Queue::default(),
            before: Neighbours::default(),
            after: Neighbours::default(),
        };
        merger.queue_pairs_of_bytes();
        Ok(merger)
    }

    fn queue_pairs_of_bytes(&mut self) {
        let mut pairs = Neighbours::default(); // a pair's number stands for the neighbour
        for (place, pair) in (0..).zip(self.slots.windows(2)) {
            if pair[0].token < 256 && pair[1].token < 256 {
                let number = pair[0].token << 8 | pair[1].token;
                pairs.add(number, place, self.counts[pair[0].word as usize]);
            }
        }
        pairs.queue(&mut self.places, &mut self.queue, |number| (number >> 8, number & 255));
    }

    /// The next pair to merge and where it stands.
    fn most_frequent(&mut self) -> Option<(Pair, Range<usize>)> {
        while let Some(top) = self.queue.pop() {
            let Reverse(pair) = top.pair;
            let (count, places) = self.recount(pair, top.places());
            if count == top.count {
                return Some((pair, places));
            }
            if count > 0 {
                self.queue.push(Queued::new(count, pair, &places));
            }
        }
        None
    }

    /// The count of a pair now. Its places move to the front of their range, and the part that they fill is returned.
    fn recount(&mut self, (first, second): Pair, range: Range<usize>) -> (u64, Range<usize>) {
        let step = self.lengths[first as usize] as usize;
        let (mut count, mut kept) = (0, range.start);
        for i in range.clone() {
            let place = self.places[i];
            let slot = self.slots[place as usize];
            if slot.token == first && self.slots[place as usize + step].token == second {
                count += self.counts[slot.word as usize];
                self.places[kept] = place;
                kept += 1;
            }
        }
        (count, range.start..kept)
    }

    /// Puts a new token where the pair stands, and queues the pairs of the new token with its neighbours.
    fn merge(&mut self, (first, second): Pair, range: Range<usize>) {
        let new = self.lengths.len() as u32;
        let step = self.lengths[first as usize];
        let length = step + self.lengths[second as usize];
        self.lengths.push(length);

        let mut made = range.start; // the places that become the new token move to the front
        for i in range.clone() {
            let place = self.places[i] as usize;
            let middle = place + step as usize;
            // In a run, such as "aaa", the pair before may have taken this place.
            if self.slots[place].token == first && self.slots[middle].token == second {
                self.slots[place].token = new;
                self.slots[middle].token = DEAD;
                self.slots[place + length as usize - 1].token = new;
                self.places[made] = place as u32;
                made += 1;
            }
        }
        for i in range.start..made {
            let place = self.places[i];
            let slot = self.slots[place as usize];
            let count = self.counts[slot.word as usize];
            let before = self.slots[place as usize - 1].token;
            let after = self.slots[(place + length) as usize].token;
            if before != BOUNDARY {
                self.before.add(before, place - self.lengths[before as usize], count);
            }
            if after != BOUNDARY && after != new {
                self.after.add(after, place, count); // new beside new is counted as a neighbour before
            }
        }
        self.before.queue(&mut self.places, &mut self.queue, |before| (before, new));
        self.after.queue(&mut self.places, &mut self.queue, |after| (new, after));
    }
}

/// The tokens found on one side of a new one: how often, and where the pair begins.
#[derive(Default)]
struct Neighbours {
    found: Vec<(u32, u32)>, // neighbour, place
    different: Vec<u32>,
    totals: Vec<Total>, // by neighbour
}

#[derive(Clone, Copy, Default)]
struct Total {
    count: u64,
    places: u32,
    cursor: usize,
}

impl Neighbours {
    #[inline]
    fn add(&mut self, neighbour: u32, place: u32, count: u64) {
        if self.totals.len() <= neighbour as usize {
            self.totals.resize(neighbour as usize + 1, Total::default());
        }
        let total = &mut self.totals[neighbour as usize];
        if total.places == 0 {
            self.different.push(neighbour);
        }
        total.places += 1;
        total.count += count;
        self.found.push((neighbour, place));
    }

    /// Queues a pair for each neighbour, appends the places, grouped by pair, and starts afresh.
    fn queue(&mut self, places: &mut Vec<u32>, queue: &mut Queue, pair: impl Fn(u32) -> Pair) {
        let mut end = places.len();
        for &neighbour in &self.different {
            let total = &mut self.totals[neighbour as usize];
            total.cursor = end;
            end += total.places as usize;
            queue.push(Queued::new(total.count, pair(neighbour), &(total.cursor..end)));
        }
        places.resize(end, 0);
        for (neighbour, place) in self.found.drain(..) {
            let cursor = &mut self.totals[neighbour as usize].cursor;
            places[*cursor] = place;
            *cursor += 1;
        }
        for neighbour in self.different.drain(..) {
            self.totals[neighbour as usize] = Total::default();
        }
    }
}

/// A pair in the queue. The greatest is the next: most frequent, then with the smaller ids.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Queued {
    count: u64,
    pair: Reverse<Pair>,
    start: usize,
    num_places: u32,
}

impl Queued {
    fn new(count: u64, pair: Pair, places: &Range<usize>) -> Self {
        Self { count, pair: Reverse(pair), start: places.start, num_places: places.len() as u32 }
    }

    fn places(&self) -> Range<usize> {
        self.start..self.start + self.num_places as usize
    }
}

/// A priority queue of which only the top is ordered: the pairs whose count has fewer bits than that of the top wait in
/// plain lists, and most of them, the rare ones, wait there for ever.
struct Queue {
    top: BinaryHeap<Queued>,
    waiting: Vec<Vec<Queued>>, // by the number of bits of the count; those of waiting.len() bits and more are in `top`
}

impl Default for Queue {
    fn default() -> Self {
        Self { top: BinaryHeap::new(), waiting: (0..=u64::BITS).map(|_| Vec::new()).collect() }
    }
}

impl Queue {
    fn push(&mut self, queued: Queued) {
        let bits = (u64::BITS - queued.count.leading_zeros()) as usize;
        match self.waiting.get_mut(bits) {
            Some(list) => list.push(queued),
            None => self.top.push(queued),
        }
    }

    fn pop(&mut self) -> Option<Queued> {
        while self.top.is_empty() {
            self.top = self.waiting.pop()?.into();
        }
        self.top.pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// Counts all pairs anew for each merge.
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
    fn the_most_frequent_pair_first_and_of_equals_the_smaller() {
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
    fn same_as_counting_anew() {
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
    fn the_callback_can_stop_it() {
        let long: Vec<u8> = (0..300_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let mut words = Words::default();
        words.push(&long, 1);
        assert_eq!(train(&words, 100_000, &mut |_, _| false), Err(Stopped::Asked));
    }
}
