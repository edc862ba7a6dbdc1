//! Letters, numbers and white space of Unicode. tools/unicode_tables.py generates the tables and says where the classes
//! come from.

pub const OTHER: u8 = 0;
pub const LETTER: u8 = 1;
pub const NUMBER: u8 = 2;
pub const SPACE: u8 = 3;

const PAGE: usize = 256; // code points
const NUM_PAGES: usize = 0x11_0000 / PAGE;

/// One byte per page, the number of its block, and then the blocks: two bits per code point, the lowest first. Pages
/// with the same classes share a block.
static TABLES: &[u8] = include_bytes!("unicode.bin");

/// The class of a code point: one of the constants above.
#[inline]
pub fn class(code: u32) -> u8 {
    let (page, index) = (code as usize / PAGE, code as usize % PAGE);
    let block = TABLES[page] as usize;
    let four_classes = TABLES[NUM_PAGES + block * PAGE / 4 + index / 4];
    four_classes >> (2 * (index % 4)) & 3
}
