//! Converts text to token ids, the same ids as tiktoken's.
//!
//! In each chunk, the two neighbours whose bytes together are the token with the lowest id are joined, the leftmost of
//! equals first, until no two neighbours form a token. By which merge a token was learned does not matter.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::hash::{Build, Key, MAX_SHORT};
use crate::split::Pattern;

/// Chunks of more bytes are joined with a heap, in n·log n. Shorter ones are scanned for each join, in n². (Heuristic,
/// not tuned: near this length both take about as long.)
const MAX_QUADRATIC: usize = 64;
const NONE: u32 = u32::MAX;

pub struct Encoder {
    pattern: Pattern,
    bytes: [u32; 256],               // the ids of the single bytes
    short: HashMap<Key, u32, Build>, // token of up to 15 bytes → id
    long: HashMap<Box<[u8]>, u32, Build>,
    joined: HashMap<u64, u32, Build>, // two ids → the id of their concatenation
}

impl Encoder {
    /// An encoder of these tokens, given by id. An error message if one of the 256 single bytes has no token.
    pub fn new<T: AsRef<[u8]>>(pattern: Pattern, tokens: &[T]) -> Result<Self, String> {
        let (mut short, mut long) = (HashMap::default(), HashMap::default());
        for (id, token) in (0..).zip(tokens.iter().map(AsRef::as_ref)) {
            if token.len() <= MAX_SHORT {
                short.insert(Key::new(token), id);
            } else {
                long.insert(token.into(), id);
            }
        }
        let mut bytes = [0; 256];
        for (byte, id) in (0..=u8::MAX).zip(&mut bytes) {
            *id = *short.get(&Key::new(&[byte])).ok_or_else(|| format!("the byte {byte} has no token"))?;
        }
        let mut encoder = Self { pattern, bytes, short, long, joined: HashMap::default() };
        for (id, token) in (0..).zip(tokens.iter().map(AsRef::as_ref)) {
            for cut in 1..token.len() {
                let (first, second) = token.split_at(cut);
                if let (Some(first), Some(second)) = (encoder.id_of(first), encoder.id_of(second)) {
                    encoder.joined.insert(pair_key(first, second), id);
                }
            }
        }
        Ok(encoder)
    }

    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut parts = Vec::new();
        let bytes = text.as_bytes();
        for (start, end) in self.pattern.split(text) {
            match self.id_of_chunk(bytes, start, end) {
                Some(id) => ids.push(id),
                None => self.join(&bytes[start..end], &mut parts, &mut ids),
            }
        }
        ids
    }

    /// The ids of each text, as `encode` returns them, computed on several threads.
    pub fn encode_batch(&self, texts: &[&str], threads: usize) -> Vec<Vec<u32>> {
        let next = AtomicUsize::new(0);
        let results = Mutex::new(vec![Vec::new(); texts.len()]);
        let work = || loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(text) = texts.get(i) else { break };
            let ids = self.encode(text);
            results.lock().unwrap_or_else(PoisonError::into_inner)[i] = ids;
        };
        thread::scope(|scope| {
            for _ in 1..threads.min(texts.len()) {
                scope.spawn(work);
            }
            work();
        });
        results.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    fn id_of_chunk(&self, text: &[u8], start: usize, end: usize) -> Option<u32> {
        match end - start {
            1 => Some(self.bytes[text[start] as usize]),
            2..=MAX_SHORT => self.short.get(&Key::of_part(text, start, end)).copied(),
            _ => self.long.get(&text[start..end]).copied(),
        }
    }

    fn id_of(&self, bytes: &[u8]) -> Option<u32> {
        self.id_of_chunk(bytes, 0, bytes.len())
    }

    #[inline]
    fn id_of_pair(&self, first: u32, second: u32) -> u32 {
        self.joined.get(&pair_key(first, second)).copied().unwrap_or(NONE)
    }

    fn join(&self, chunk: &[u8], parts: &mut Vec<Part>, ids: &mut Vec<u32>) {
        parts.clear();
        for (i, &byte) in chunk.iter().enumerate() {
            let id = self.bytes[byte as usize];
            let joined = chunk.get(i + 1).map_or(NONE, |&next| self.id_of_pair(id, self.bytes[next as usize]));
            parts.push(Part { id, joined, before: (i as u32).wrapping_sub(1), after: i as u32 + 1 });
        }
        if chunk.len() <= MAX_QUADRATIC {
            self.join_few(parts);
            ids.extend(parts.iter().map(|part| part.id));
        } else {
            self.join_many(parts);
            let mut at = 0;
            while let Some(part) = parts.get(at) {
                ids.push(part.id);
                at = part.after as usize;
            }
        }
    }

    fn join_few(&self, parts: &mut Vec<Part>) {
        loop {
            let lowest = parts.iter().enumerate().min_by_key(|(_, part)| part.joined);
            let Some((at, &Part { joined, .. })) = lowest else { return };
            if joined == NONE {
                return;
            }
            parts.remove(at + 1);
            parts[at].id = joined;
            parts[at].joined = parts.get(at + 1).map_or(NONE, |after| self.id_of_pair(joined, after.id));
            if at > 0 {
                parts[at - 1].joined = self.id_of_pair(parts[at - 1].id, joined);
            }
        }
    }

    fn join_many(&self, parts: &mut [Part]) {
        let queue_entry = |joined: u32, at: usize| Reverse(u64::from(joined) << 32 | at as u64);
        let candidates = parts.iter().enumerate().filter(|(_, part)| part.joined != NONE);
        let mut queue: BinaryHeap<_> = candidates.map(|(at, part)| queue_entry(part.joined, at)).collect();
        while let Some(Reverse(queued)) = queue.pop() {
            let (joined, at) = ((queued >> 32) as u32, queued as u32 as usize);
            if parts[at].joined != joined {
                continue; // outdated: one of the two has been joined since
            }
            let gone = parts[at].after as usize;
            let after = parts[gone].after as usize;
            parts[gone].joined = NONE;
            parts[at].id = joined;
            parts[at].after = after as u32;
            parts[at].joined = NONE;
            if after < parts.len() {
                parts[after].before = at as u32;
                parts[at].joined = self.id_of_pair(joined, parts[after].id);
                if parts[at].joined != NONE {
                    queue.push(queue_entry(parts[at].joined, at));
                }
            }
            let before = parts[at].before as usize;
            if before < parts.len() {
                parts[before].joined = self.id_of_pair(parts[before].id, joined);
                if parts[before].joined != NONE {
                    queue.push(queue_entry(parts[before].joined, before));
                }
            }
        }
    }
}

/// A token of a chunk while it is joined. A neighbour outside of the chunk means that there is none.
#[derive(Clone, Copy)]
struct Part {
    id: u32,
    joined: u32, // the token that it forms with the next one, or NONE
    before: u32,
    after: u32,
}

fn pair_key(first: u32, second: u32) -> u64 {
    u64::from(first) << 32 | u64::from(second)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::tokens_of;

    fn encoder(merges: &[(u32, u32)]) -> Encoder {
        Encoder::new(Pattern::parse(Pattern::GPT4).unwrap(), &tokens_of(merges)).unwrap()
    }

    const A: u32 = b'a' as u32;

    #[test]
    fn lowest_id_is_joined_first_and_leftmost_of_equals() {
        let merges = [(A + 1, A + 2), (A, A + 1), (A, A)]; // bc, ab, aa
        assert_eq!(encoder(&merges).encode("abc"), [A, 256]);
        assert_eq!(encoder(&merges).encode("aaa abd"), [258, A, 32, 257, A + 3]);
        assert_eq!(encoder(&merges).encode(""), [0; 0]);
    }

    #[test]
    fn tokens_match_by_bytes_and_not_by_merge() {
        let merges = [(A, A + 1), (A + 1, A + 2), (256, A + 2), (A + 3, A)]; // ab, bc, abc, da
        assert_eq!(encoder(&merges).encode("abc"), [258]);
        assert_eq!(encoder(&merges).encode("dabc"), [A + 3, 258]);
    }

    #[test]
    fn heap_joins_like_scanning() {
        let merges = [(A, A), (256, 256), (257, A + 1), (A + 1, A), (A + 1, A + 1), (260, 260)];
        let encoder = encoder(&merges);
        let mut state = 7u32;
        for length in 1..200 {
            let chunk: Vec<u8> = (0..length)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    b'a' + (state >> 30 == 0) as u8
                })
                .collect();
            let (mut ids, mut parts) = (Vec::new(), Vec::new());
            encoder.join(&chunk, &mut parts, &mut ids);
            let pair =
                |i: usize| chunk.get(i + 1).map_or(NONE, |&next| encoder.id_of_pair(chunk[i].into(), next.into()));
            let mut slow: Vec<Part> =
                (0..length).map(|i| Part { id: chunk[i].into(), joined: pair(i), before: 0, after: 0 }).collect();
            encoder.join_few(&mut slow);
            assert_eq!(ids, slow.iter().map(|part| part.id).collect::<Vec<_>>());
        }
    }

    #[test]
    fn batch_equals_single_texts() {
        let encoder = encoder(&[(A, A)]);
        let texts = ["aaa", "", "b aa", "é"];
        let expected: Vec<_> = texts.iter().map(|text| encoder.encode(text)).collect();
        assert_eq!(encoder.encode_batch(&texts, 3), expected);
        assert!(encoder.encode_batch(&[], 3).is_empty());
    }

    #[test]
    fn single_bytes_need_a_token_of_any_id() {
        let pattern = Pattern::parse(Pattern::GPT4).unwrap();
        let mut tokens = tokens_of(&[(A, A)]);
        tokens.reverse();
        assert_eq!(Encoder::new(pattern, &tokens).unwrap().encode("aaa"), [0, 256 - A]);
        tokens.pop();
        assert_eq!(Encoder::new(pattern, &tokens).err().unwrap(), "the byte 0 has no token");
    }
}
