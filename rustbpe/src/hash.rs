//! Keys of hash tables: short byte strings as two integers, and a fast hash of multiplications and rotations, like the
//! one in the Rust compiler. It does not protect against keys chosen to collide.

use std::hash::{BuildHasherDefault, Hash, Hasher};

pub type Build = BuildHasherDefault<Fast>;

/// 2^64 / golden ratio, odd: spreads neighbouring keys over the whole range.
const MULTIPLIER: u64 = 0x9E37_79B9_7F4A_7C15;

#[derive(Default, Clone, Copy)]
pub struct Fast(u64);

impl Hasher for Fast {
    #[inline]
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(23) ^ value).wrapping_mul(MULTIPLIER);
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    fn write(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    /// Multiplication mixes the high bits best, but tables use the low bits too.
    #[inline]
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }
}

pub const MAX_SHORT: usize = 15;

/// Up to 15 bytes, from the lowest byte upwards, padded with zeros, and their number in the highest byte.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Key([u64; 2]);

impl Key {
    pub fn new(bytes: &[u8]) -> Self {
        Self::of_part(bytes, 0, bytes.len())
    }

    /// The key of text[start..end], read as 16 bytes at once if the text is long enough.
    #[inline]
    pub fn of_part(text: &[u8], start: usize, end: usize) -> Self {
        let length = end - start;
        debug_assert!(length <= MAX_SHORT);
        if let Some(window) = text.get(start..start + 16) {
            Self::of_window(window, length)
        } else {
            let mut window = [0; 16];
            window[..length].copy_from_slice(&text[start..end]);
            Self::of_window(&window, length)
        }
    }

    #[inline]
    fn of_window(window: &[u8], length: usize) -> Self {
        let word = |i: usize| window[i..i + 8].try_into().map_or(0, u64::from_le_bytes);
        let keep = |bytes: usize| (1u64 << (8 * bytes)) - 1;
        let tag = (length as u64) << 56;
        if length < 8 {
            Self([word(0) & keep(length), tag])
        } else {
            Self([word(0), word(8) & keep(length - 8) | tag])
        }
    }

    /// The bytes, and how many of the 16 they are.
    pub fn bytes(self) -> ([u8; 16], usize) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.0[0].to_le_bytes());
        bytes[8..].copy_from_slice(&self.0[1].to_le_bytes());
        (bytes, bytes[15] as usize)
    }

    #[inline]
    pub fn hash64(self) -> u64 {
        let mut hasher = Fast::default();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

impl Hash for Key {
    #[inline]
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        hasher.write_u64(self.0[0]);
        hasher.write_u64(self.0[1]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_the_bytes_whatever_follows_them() {
        let text: Vec<u8> = (0..40).map(|i| i * 5).collect();
        for start in 0..40 {
            for end in start..=40.min(start + MAX_SHORT) {
                let key = Key::of_part(&text, start, end);
                let (bytes, length) = key.bytes();
                assert_eq!(&bytes[..length], &text[start..end]);
                assert!(key == Key::new(&text[start..end]));
            }
        }
        assert!(Key::new(b"a") != Key::new(b"a\0"));
    }
}
