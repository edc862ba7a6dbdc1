//! Splits text into chunks as this regular expression does, for K = 1, 2 or 3:
//!
//! ```text
//! '(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,K}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+
//! ```
//!
//! Written by hand, because reading each byte about once is many times as fast as a backtracking engine. Some
//! alternative matches at every character, so the chunks together are the whole text.

use crate::unicode::{self, LETTER, NUMBER, OTHER, SPACE};

const HEAD: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}";
const TAIL: &str = r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// One of the supported patterns: they differ in how many digits stay together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    max_digits: usize,
}

impl Pattern {
    pub const GPT4: &'static str = concat!(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}",
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    );

    /// The pattern of this regular expression; None if it is not supported.
    pub fn parse(regex: &str) -> Option<Self> {
        let max_digits = match regex.strip_prefix(HEAD)?.strip_suffix(TAIL)? {
            "" | "{1,1}" | "{1}" => 1,
            "{1,2}" => 2,
            "{1,3}" => 3,
            _ => return None,
        };
        Some(Self { max_digits })
    }

    /// The chunks of the text in order. Concatenated they are the text.
    pub fn split(self, text: &str) -> Chunks<'_> {
        Chunks { text: text.as_bytes(), start: 0, max_digits: self.max_digits }
    }
}

/// Iterator over the chunks, as (start, end) in bytes.
pub struct Chunks<'a> {
    text: &'a [u8],
    start: usize,
    max_digits: usize,
}

impl Iterator for Chunks<'_> {
    type Item = (usize, usize);

    #[inline]
    fn next(&mut self) -> Option<(usize, usize)> {
        let start = self.start;
        if start == self.text.len() {
            return None;
        }
        self.start = self.end_of_chunk(start);
        Some((start, self.start))
    }
}

impl Chunks<'_> {
    #[inline]
    fn end_of_chunk(&self, start: usize) -> usize {
        let (kind, width) = self.class_at(start);
        let second = start + width;
        match kind {
            LETTER => self.skip(second, LETTER),
            NUMBER => self.skip_digits(second),
            _ => {
                let first = self.text[start];
                if first == b'\'' {
                    if let Some(end) = self.contraction(second) {
                        return end;
                    }
                }
                let (next_kind, next_width) = self.class_at(second);
                if next_kind == LETTER && !is_newline(first) {
                    return self.skip(second + next_width, LETTER);
                }
                if kind == OTHER {
                    return self.skip_newlines(self.skip(second, OTHER));
                }
                if first == b' ' && next_kind == OTHER {
                    return self.skip_newlines(self.skip(second + next_width, OTHER));
                }
                self.end_of_spaces(start, second)
            }
        }
    }

    /// The end of `\s*[\r\n]|\s+(?!\S)|\s+`: after the last newline of the run of white space. If there is none, the
    /// end of the run, or one character before it if a word follows.
    fn end_of_spaces(&self, start: usize, second: usize) -> usize {
        let (mut end, mut last, mut after_newline) = (second, start, 0);
        if is_newline(self.text[start]) {
            after_newline = second;
        }
        loop {
            let (kind, width) = self.class_at(end);
            if kind != SPACE {
                break;
            }
            last = end;
            end += width;
            if is_newline(self.text[last]) {
                after_newline = end;
            }
        }
        if after_newline > 0 {
            after_newline
        } else if end == self.text.len() || last == start {
            end
        } else {
            last
        }
    }

    /// The end of `(?i:[sdmt]|ll|ve|re)` if it matches here. Ignoring case, ſ (U+017F) is an s.
    fn contraction(&self, at: usize) -> Option<usize> {
        let lower = |at: usize| self.text.get(at).map_or(0, u8::to_ascii_lowercase);
        match (lower(at), lower(at + 1)) {
            (b's' | b'd' | b'm' | b't', _) => Some(at + 1),
            (b'l', b'l') | (b'v' | b'r', b'e') | (0xC5, 0xBF) => Some(at + 2),
            _ => None,
        }
    }

    /// The end of the run of characters of this class that continues here.
    #[inline]
    fn skip(&self, mut at: usize, kind: u8) -> usize {
        loop {
            while let Some(&byte) = self.text.get(at) {
                if ASCII[byte as usize] != kind {
                    break;
                }
                at += 1;
            }
            match self.text.get(at) {
                Some(0x80..) => (),
                _ => return at,
            }
            let (found, width) = self.wide_class_at(at);
            if found != kind {
                return at;
            }
            at += width;
        }
    }

    fn skip_digits(&self, mut at: usize) -> usize {
        for _ in 1..self.max_digits {
            let (kind, width) = self.class_at(at);
            if kind != NUMBER {
                break;
            }
            at += width;
        }
        at
    }

    fn skip_newlines(&self, mut at: usize) -> usize {
        while self.text.get(at).is_some_and(|&byte| is_newline(byte)) {
            at += 1;
        }
        at
    }

    /// The class of the character that starts here and its length in bytes; (END, 0) at the end of the text.
    #[inline]
    fn class_at(&self, at: usize) -> (u8, usize) {
        match self.text.get(at) {
            None => (END, 0),
            Some(&byte) if byte < 0x80 => (ASCII[byte as usize], 1),
            Some(_) => self.wide_class_at(at),
        }
    }

    /// As class_at, for a character of two to four bytes.
    fn wide_class_at(&self, at: usize) -> (u8, usize) {
        let byte = |i: usize| u32::from(self.text.get(at + i).copied().unwrap_or(0));
        let low = |i: usize| byte(i) & 0x3F;
        let (code, width) = match byte(0) {
            0xF0.. => ((byte(0) & 7) << 18 | low(1) << 12 | low(2) << 6 | low(3), 4),
            0xE0.. => ((byte(0) & 15) << 12 | low(1) << 6 | low(2), 3),
            _ => ((byte(0) & 31) << 6 | low(1), 2),
        };
        (unicode::class(code), width)
    }
}

#[inline]
fn is_newline(byte: u8) -> bool {
    byte == b'\r' || byte == b'\n'
}

const END: u8 = 4;
const WIDE: u8 = 5;

/// The class of each byte below 128. All others are part of a character of several bytes.
static ASCII: [u8; 256] = ascii_classes();

const fn ascii_classes() -> [u8; 256] {
    let mut table = [WIDE; 256];
    let mut byte = 0u8;
    while byte < 128 {
        table[byte as usize] = match byte {
            b'a'..=b'z' | b'A'..=b'Z' => LETTER,
            b'0'..=b'9' => NUMBER,
            b'\t'..=b'\r' | b' ' => SPACE,
            _ => OTHER,
        };
        byte += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(regex: &str, text: &str) -> Vec<String> {
        let chunks = Pattern::parse(regex).unwrap().split(text);
        chunks.map(|(start, end)| text[start..end].into()).collect()
    }

    #[test]
    fn words_take_one_character_before_them() {
        let chunks = split(Pattern::GPT4, "Hello, wörld! (ok)\tfine _x");
        assert_eq!(chunks, ["Hello", ",", " wörld", "!", " (", "ok", ")", "\tfine", " _", "x"]);
    }

    #[test]
    fn contractions_in_any_case() {
        assert_eq!(split(Pattern::GPT4, "I'LL'sx'ſ'Rel"), ["I", "'LL", "'s", "x", "'ſ", "'Re", "l"]);
        assert_eq!(split(Pattern::GPT4, "''l 'lx"), ["''", "l", " '", "lx"]);
    }

    #[test]
    fn digits_stay_together_up_to_the_limit() {
        let regex = |quantifier: &str| format!("{HEAD}{quantifier}{TAIL}");
        assert_eq!(split(&regex(""), "1234"), ["1", "2", "3", "4"]);
        assert_eq!(split(&regex("{1,1}"), "12"), ["1", "2"]);
        assert_eq!(split(&regex("{1,2}"), "12345"), ["12", "34", "5"]);
        assert_eq!(split(&regex("{1,3}"), "a1234½"), ["a", "123", "4½"]);
    }

    #[test]
    fn white_space_leaves_one_to_the_word() {
        assert_eq!(split(Pattern::GPT4, "a   b"), ["a", "  ", " b"]);
        assert_eq!(split(Pattern::GPT4, "a   "), ["a", "   "]);
        assert_eq!(split(Pattern::GPT4, "a \r\n \n  b"), ["a", " \r\n \n", " ", " b"]);
        assert_eq!(split(Pattern::GPT4, "!\n\n x\u{a0}\u{2003}1"), ["!\n\n", " x", "\u{a0}", "\u{2003}", "1"]);
        assert_eq!(split(Pattern::GPT4, ""), [""; 0]);
    }

    #[test]
    fn other_patterns_are_not_supported() {
        for regex in ["", r"\w+", r"\p{N}", &Pattern::GPT4.replace("{1,3}", "{1,4}")] {
            assert_eq!(Pattern::parse(regex), None);
        }
    }
}
