//! Byte-level byte-pair encoding as in GPT-4: training on all cores, and encoding.
//!
//! 1. [`split`] cuts a document into chunks, as the regular expressions of the GPT-4 family do.
//! 2. [`count`] counts the distinct chunks of all documents.
//! 3. [`merge`] learns the merges: the most frequent pair of neighbouring tokens becomes a new token, repeatedly.
//! 4. [`encode`] converts text to token ids with these merges.
//!
//! Time for 68 MB of English (14.2 million chunks, 215,000 distinct ones) and 32,768 tokens on two Zen 5 cores: 0.4 s.
//! Of these, 0.17 s are splitting and counting (on one core 0.32 s, of which splitting 0.19 s), 0.13 s merging, and the
//! rest encoding UTF-8 in Python. Memory bandwidth is not the limit: reading the text would take 4 ms at 17 GB/s.
//! Counting takes 23 ns per chunk because of unpredictable branches (where a word ends, which word it is), and merging
//! is limited by jumps in memory. The published package takes 4.3 s for the same merges: a backtracking regex engine
//! finds the chunks, each chunk becomes a separate string, and each merge updates a table of pairs.
//!
//! `ffi` is the C interface that the Python package loads; it contains all `unsafe` code of the crate.
//!
//! ```
//! use rustbpe::{count::Counter, encode::Encoder, merge::{tokens_of, train}, split::Pattern};
//!
//! let pattern = Pattern::parse(Pattern::GPT4).unwrap();
//! let counter = Counter::new(pattern, 2);
//! counter.add(&["low lower lowest", "slow"]);
//! let merges = train(&counter.finish(), 256 + 2, &mut |_, _| true).unwrap();
//! assert_eq!(merges, [(b'l'.into(), b'o'.into()), (256, b'w'.into())]); // "lo", then "low"
//! let encoder = Encoder::new(pattern, &tokens_of(&merges)).unwrap();
//! assert_eq!(encoder.encode("low"), [257]);
//! ```

pub mod count;
pub mod encode;
#[allow(unsafe_code)]
mod ffi;
pub mod hash;
pub mod merge;
pub mod split;
mod unicode;
