//! The C interface for the Python package. All `unsafe` code of the crate is here.
//!
//! Every function requires of its caller: a pointer to an object was returned by a function of this file and has not
//! been freed; a pointer with a number of elements points to that many; what it points to is neither freed nor changed
//! during the call. No function unwinds into C: a panic is returned as an error.

use std::os::raw::c_int;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::{ptr, slice, str};

use crate::count::Counter;
use crate::encode::Encoder;
use crate::merge::{train, Stopped};
use crate::split::Pattern;

pub const RUSTBPE_OK: c_int = 0;
pub const RUSTBPE_FAILED: c_int = 1; // a panic or invalid UTF-8: a bug of the caller or of this crate
pub const RUSTBPE_STOPPED: c_int = 2; // by the progress callback
pub const RUSTBPE_TOO_LARGE: c_int = 3; // more than 4 GB of distinct chunks

/// Rows of numbers, the result of training and encoding. Free with rustbpe_rows_free.
pub struct Rows(Vec<Vec<u32>>);

/// Whether the pattern is supported.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_supports_pattern(pattern: *const u8, length: usize) -> bool {
    // SAFETY: the caller guarantees `length` bytes.
    unsafe { read_pattern(pattern, length) }.is_some()
}

/// A counter; null if the pattern is not supported. rustbpe_train or rustbpe_counter_free frees it.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_counter_new(pattern: *const u8, length: usize, threads: usize) -> *mut Counter {
    // SAFETY: the caller guarantees `length` bytes.
    match unsafe { read_pattern(pattern, length) } {
        Some(pattern) => Box::into_raw(Box::new(Counter::new(pattern, threads))),
        None => ptr::null_mut(),
    }
}

/// Counts the chunks of `num` documents in UTF-8, each given by a pointer and a number of bytes.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_count(
    counter: *const Counter,
    documents: *const *const u8,
    lengths: *const usize,
    num: usize,
) -> c_int {
    // SAFETY: the caller guarantees a live counter; it is shared, and Counter is Sync.
    let counter = unsafe { &*counter };
    // SAFETY: the caller guarantees `num` documents that live until the function returns, and no reference outlives it.
    let Some(documents) = (unsafe { read_texts(documents, lengths, num) }) else { return RUSTBPE_FAILED };
    match catch_unwind(AssertUnwindSafe(|| counter.add(&documents))) {
        Ok(()) => RUSTBPE_OK,
        Err(_) => RUSTBPE_FAILED,
    }
}

/// Learns merges and frees the counter. Returns one row with the two ids of each merge. `progress(done, total)` stops
/// the training by returning 0.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_train(
    counter: *mut Counter,
    vocab_size: usize,
    progress: extern "C" fn(usize, usize) -> c_int,
    status: *mut c_int,
) -> *mut Rows {
    // SAFETY: the caller gives up a counter that rustbpe_counter_new made with Box.
    let counter = unsafe { Box::from_raw(counter) };
    let learn = || train(&counter.finish(), vocab_size, &mut |done, total| progress(done, total) != 0);
    let (rows, result) = match catch_unwind(AssertUnwindSafe(learn)) {
        Ok(Ok(merges)) => {
            let ids = merges.iter().flat_map(|&(first, second)| [first, second]);
            (Box::into_raw(Box::new(Rows(vec![ids.collect()]))), RUSTBPE_OK)
        }
        Ok(Err(Stopped::ByCallback)) => (ptr::null_mut(), RUSTBPE_STOPPED),
        Ok(Err(Stopped::TooLarge)) => (ptr::null_mut(), RUSTBPE_TOO_LARGE),
        Err(_) => (ptr::null_mut(), RUSTBPE_FAILED),
    };
    // SAFETY: the caller guarantees space for one int.
    unsafe { *status = result };
    rows
}

#[no_mangle]
pub unsafe extern "C" fn rustbpe_counter_free(counter: *mut Counter) {
    // SAFETY: the caller gives up a counter that rustbpe_counter_new made with Box.
    drop(unsafe { Box::from_raw(counter) });
}

/// An encoder with these tokens, by id; null if the pattern is not supported or a single byte has no token.
/// Free with rustbpe_encoder_free.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_encoder_new(
    pattern: *const u8,
    length: usize,
    tokens: *const *const u8,
    lengths: *const usize,
    num: usize,
) -> *mut Encoder {
    // SAFETY: the caller guarantees `length` bytes, and `num` tokens that live until the function returns.
    let (pattern, tokens) = unsafe { (read_pattern(pattern, length), read_bytes(tokens, lengths, num)) };
    let Some(pattern) = pattern else { return ptr::null_mut() };
    match catch_unwind(|| Encoder::new(pattern, &tokens)) {
        Ok(Ok(encoder)) => Box::into_raw(Box::new(encoder)),
        _ => ptr::null_mut(),
    }
}

/// The ids of `num` texts in UTF-8, a row for each; null if something failed.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_encode(
    encoder: *const Encoder,
    texts: *const *const u8,
    lengths: *const usize,
    num: usize,
    threads: usize,
) -> *mut Rows {
    // SAFETY: the caller guarantees a live encoder; it is shared, and Encoder is Sync.
    let encoder = unsafe { &*encoder };
    // SAFETY: the caller guarantees `num` texts that live until the function returns, and no reference outlives it.
    let Some(texts) = (unsafe { read_texts(texts, lengths, num) }) else { return ptr::null_mut() };
    match catch_unwind(AssertUnwindSafe(|| encoder.encode_batch(&texts, threads))) {
        Ok(rows) => Box::into_raw(Box::new(Rows(rows))),
        Err(_) => ptr::null_mut(),
    }
}

/// The ends of the chunks of `num` texts in UTF-8, in bytes, a row for each text; null if something failed.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_split(
    pattern: *const u8,
    length: usize,
    texts: *const *const u8,
    lengths: *const usize,
    num: usize,
) -> *mut Rows {
    // SAFETY: the caller guarantees `length` bytes, and `num` texts that live until the function returns.
    let read = unsafe { (read_pattern(pattern, length), read_texts(texts, lengths, num)) };
    let (Some(pattern), Some(texts)) = read else { return ptr::null_mut() };
    let ends = |text: &&str| pattern.split(text).map(|(_, end)| u32::try_from(end)).collect();
    match catch_unwind(|| texts.iter().map(ends).collect()) {
        Ok(Ok(rows)) => Box::into_raw(Box::new(Rows(rows))),
        _ => ptr::null_mut(), // a panic, or a text of more than 4 GB
    }
}

#[no_mangle]
pub unsafe extern "C" fn rustbpe_encoder_free(encoder: *mut Encoder) {
    // SAFETY: the caller gives up an encoder that rustbpe_encoder_new made with Box.
    drop(unsafe { Box::from_raw(encoder) });
}

/// Row i, and its length in `length`; null if there is no such row. Valid until the rows are freed.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_row(rows: *const Rows, i: usize, length: *mut usize) -> *const u32 {
    // SAFETY: the caller guarantees live rows.
    let rows = unsafe { &*rows };
    let Some(row) = rows.0.get(i) else { return ptr::null() };
    // SAFETY: the caller guarantees space for one number.
    unsafe { *length = row.len() };
    row.as_ptr()
}

#[no_mangle]
pub unsafe extern "C" fn rustbpe_rows_free(rows: *mut Rows) {
    // SAFETY: the caller gives up rows that rustbpe_train, rustbpe_encode or rustbpe_split made with Box.
    drop(unsafe { Box::from_raw(rows) });
}

/// SAFETY: `pattern` points to `length` bytes.
unsafe fn read_pattern(pattern: *const u8, length: usize) -> Option<Pattern> {
    // SAFETY: as guaranteed; the slice is not kept.
    let bytes = unsafe { elements(pattern, length) };
    Pattern::parse(&String::from_utf8_lossy(bytes))
}

/// SAFETY: as for read_bytes. None if a text is not UTF-8 (checked at about 10 GB/s).
unsafe fn read_texts<'a>(texts: *const *const u8, lengths: *const usize, num: usize) -> Option<Vec<&'a str>> {
    // SAFETY: as guaranteed.
    let strings = unsafe { read_bytes(texts, lengths, num) };
    strings.into_iter().map(|bytes| str::from_utf8(bytes).ok()).collect()
}

/// SAFETY: `strings` and `lengths` point to `num` elements, and each string to its length in bytes, for the whole of
/// 'a.
unsafe fn read_bytes<'a>(strings: *const *const u8, lengths: *const usize, num: usize) -> Vec<&'a [u8]> {
    // SAFETY: as guaranteed.
    let (strings, lengths) = unsafe { (elements(strings, num), elements(lengths, num)) };
    // SAFETY: as guaranteed.
    strings.iter().zip(lengths).map(|(&bytes, &length)| unsafe { elements(bytes, length) }).collect()
}

/// SAFETY: `first` points to `num` elements for the whole of 'a. With num = 0 it may be anything, even null.
unsafe fn elements<'a, T>(first: *const T, num: usize) -> &'a [T] {
    if num == 0 {
        return &[];
    }
    // SAFETY: as guaranteed.
    unsafe { slice::from_raw_parts(first, num) }
}
