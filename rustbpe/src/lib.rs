//! Byte-level byte-pair encoding in the manner of GPT-4: training on all cores, and encoding.
//!
//! 1. [`split`] cuts a document into chunks, as the regular expressions of the GPT-4 family do.
//! 2. [`count`] counts the different chunks of all documents.
//! 3. [`merge`] learns: again and again the most frequent pair of neighbours becomes a new token.
//! 4. [`encode`] turns text into token ids with what was learned.
//!
//! Where the time goes, for 68 MB of English (14.2 million chunks, 215,000 different ones) to 32,768 tokens, on two cores
//! of Zen 5: 0.4 s, of which 0.17 s are splitting and counting (on one core 0.32 s, of which splitting 0.19 s), 0.13 s
//! merging and the rest the making of UTF-8 in Python. Reading the text from memory would take 4 ms at 17 GB/s: what
//! limits counting, at 23 ns a chunk, are the branches that nobody can predict, where a word ends and which it is, and
//! merging the steps from place to place, not the bandwidth. The published package takes 4.3 s for the same merges: a
//! backtracking engine finds the chunks, each becomes a string of its own, and each merge updates a table of pairs.
//!
//! `ffi` is the C interface that the Python package loads; all `unsafe` code of the crate is there.
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
