//! Counts the distinct chunks of all documents on all cores, in memory proportional to the distinct chunks.
//!
//! Each thread counts in a small table that fits into the core's cache, and adds it to a large table, which all threads
//! share, when it is full. Chunks of up to 15 bytes, nearly all of them, are stored as two integers and not as strings.

use std::collections::HashMap;
use std::hash::Hasher;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::hash::{Build, Fast, Key, MAX_SHORT};
use crate::split::Pattern;

/// Distinct chunks and their counts, in no particular order. Chunks of one byte have nothing to merge and are omitted.
#[derive(Default)]
pub struct Words {
    pub bytes: Vec<u8>,   // of all chunks, concatenated
    pub ends: Vec<usize>, // end of each chunk in `bytes`
    pub counts: Vec<u64>,
}

const SHARDS: usize = 64; // many more than threads, so that two rarely wait for each other
const LOCAL_SLOTS: usize = 1 << 15; // × 24 bytes: fits into the second-level cache of most cores (1–2 MiB)
const LOCAL_FULL: usize = LOCAL_SLOTS / 2; // with more, probing takes longer
const DOCUMENTS_AT_ONCE: usize = 16; // that a thread takes; heuristic, not tuned

#[derive(Default)]
struct Shard {
    short: HashMap<Key, u64, Build>,
    long: HashMap<Box<[u8]>, u64, Build>,
}

pub struct Counter {
    pattern: Pattern,
    threads: usize,
    shards: Vec<Mutex<Shard>>,
}

impl Counter {
    pub fn new(pattern: Pattern, threads: usize) -> Self {
        Self { pattern, threads: threads.max(1), shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }

    /// Counts the chunks of these documents. No chunk spans two documents.
    pub fn add(&self, documents: &[&str]) {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut local = Local::new(&self.shards);
            loop {
                let start = next.fetch_add(DOCUMENTS_AT_ONCE, Ordering::Relaxed);
                let Some(rest) = documents.get(start..) else { break };
                if rest.is_empty() {
                    break;
                }
                for document in rest.iter().take(DOCUMENTS_AT_ONCE) {
                    self.add_document(document, &mut local);
                }
            }
            local.flush();
        };
        let threads = self.threads.min(documents.len().div_ceil(DOCUMENTS_AT_ONCE));
        thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(work);
            }
            work();
        });
    }

    fn add_document(&self, document: &str, local: &mut Local) {
        let bytes = document.as_bytes();
        for (start, end) in self.pattern.split(document) {
            let length = end - start;
            if length == 1 {
                continue;
            }
            if length <= MAX_SHORT {
                local.add_short(Key::of_part(bytes, start, end));
            } else {
                local.add_long(&bytes[start..end]);
            }
        }
    }

    pub fn finish(self) -> Words {
        let mut words = Words::default();
        for shard in self.shards {
            let shard = shard.into_inner().unwrap_or_else(PoisonError::into_inner);
            for (key, count) in shard.short {
                let (bytes, length) = key.bytes();
                words.push(&bytes[..length], count);
            }
            for (bytes, count) in shard.long {
                words.push(&bytes, count);
            }
        }
        words
    }
}

impl Words {
    pub fn push(&mut self, bytes: &[u8], count: u64) {
        self.bytes.extend_from_slice(bytes);
        self.ends.push(self.bytes.len());
        self.counts.push(count);
    }
}

/// The table of one thread: open addressing with linear probing. A count of 0 marks an empty slot.
struct Local<'a> {
    slots: Vec<(Key, u64)>,
    used: usize,
    staged: Vec<Vec<(Key, u64)>>, // by shard
    shards: &'a [Mutex<Shard>],
}

impl<'a> Local<'a> {
    fn new(shards: &'a [Mutex<Shard>]) -> Self {
        Self { slots: vec![(Key::default(), 0); LOCAL_SLOTS], used: 0, staged: vec![Vec::new(); SHARDS], shards }
    }

    #[inline]
    fn add_short(&mut self, key: Key) {
        let mut at = key.hash64() as usize % LOCAL_SLOTS;
        loop {
            let slot = &mut self.slots[at];
            if slot.0 == key {
                slot.1 += 1;
                return;
            }
            if slot.1 == 0 {
                *slot = (key, 1);
                self.used += 1;
                if self.used == LOCAL_FULL {
                    self.flush();
                }
                return;
            }
            at = (at + 1) % LOCAL_SLOTS;
        }
    }

    fn add_long(&mut self, bytes: &[u8]) {
        let mut hasher = Fast::default();
        hasher.write(bytes);
        let shard = &self.shards[shard_of(hasher.finish())];
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = shard.long.get_mut(bytes) {
            *count += 1;
        } else {
            shard.long.insert(bytes.into(), 1);
        }
    }

    /// Adds the counts to the shared table and empties this one.
    fn flush(&mut self) {
        for slot in &mut self.slots {
            if slot.1 > 0 {
                self.staged[shard_of(slot.0.hash64())].push(*slot);
                *slot = (Key::default(), 0);
            }
        }
        self.used = 0;
        for (shard, staged) in self.shards.iter().zip(&mut self.staged) {
            if staged.is_empty() {
                continue;
            }
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            for (key, count) in staged.drain(..) {
                *shard.short.entry(key).or_insert(0) += count;
            }
        }
    }
}

/// The shard of a hash, from bits that the local tables and the shards' own tables do not use first.
fn shard_of(hash: u64) -> usize {
    (hash >> 40) as usize % SHARDS
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn count(documents: &[&str], threads: usize) -> BTreeMap<Vec<u8>, u64> {
        let counter = Counter::new(Pattern::parse(Pattern::GPT4).unwrap(), threads);
        for part in documents.chunks(1000) {
            counter.add(part);
        }
        let words = counter.finish();
        let mut counts = BTreeMap::new();
        let mut start = 0;
        for (&end, &count) in words.ends.iter().zip(&words.counts) {
            let before = counts.insert(words.bytes[start..end].to_vec(), count);
            assert_eq!(before, None, "a chunk was counted twice");
            start = end;
        }
        counts
    }

    #[test]
    fn chunks_do_not_span_documents_and_single_bytes_are_omitted() {
        let counts = count(&["ab ab", "ab", "a", "", "b"], 2);
        assert_eq!(counts, BTreeMap::from([(b"ab".to_vec(), 2), (b" ab".to_vec(), 1)]));
    }

    #[test]
    fn counts_do_not_depend_on_threads_when_local_tables_overflow() {
        let documents: Vec<String> = (0..3000u32)
            .map(|i| (0..40).map(|j| format!(" w{} longerthanfifteen{}", i * 7 + j, i % 9)).collect())
            .collect();
        let documents: Vec<&str> = documents.iter().map(String::as_str).collect();
        let counts = count(&documents, 1);
        assert_eq!(counts, count(&documents, 3));
        assert_eq!(counts[b" longerthanfifteen".as_slice()], 3000 * 40);
    }
}
