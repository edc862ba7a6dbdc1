//! Byte-level byte-pair encoding in the manner of GPT-4: training on all cores, and encoding.
//!
//! 1. [`split`] cuts a document into chunks, as the regular expressions of the GPT-4 family do.
//! 2. [`count`] counts the different chunks of all documents.
//! 3. [`merge`] learns: again and again the most frequent pair of neighbours becomes a new token.
//! 4. [`encode`] turns text into token ids with what was learned.
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
