//! What an input is about: a seed with patches, or bytes as they are. Header and tables refer to each other all over the
//! place, so that random bytes get nowhere; patches are aimed at structures, and may make one point to another.

use crate::bytes::Bytes;
use crate::images::{SEEDS, Seed};

/// Largest whole image that is taken.
const WHOLE_MAX: usize = 1 << 20;
/// Most patches.
const PATCHES_MAX: u8 = 8;

pub struct Subject {
    pub seed: &'static Seed,
    pub bytes: Vec<u8>,
    /// It is the seed as it was.
    pub is_sound: bool,
}

impl Subject {
    /// First byte 255: the rest is an image; what lies under it, and its data file, are those of the last seed. Otherwise
    /// a seed, a number of patches, and the patches; the rest of the input says what to do.
    pub fn take(input: &mut Bytes<'_>) -> Self {
        let number = input.u8();
        if number == u8::MAX {
            let bytes = input.take(WHOLE_MAX).to_vec();
            return Self { seed: &SEEDS[SEEDS.len() - 1], bytes, is_sound: false };
        }
        let seed = &SEEDS[number as usize % SEEDS.len()];
        let mut bytes = seed.bytes.clone();
        for _ in 0..input.u8() % (PATCHES_MAX + 1) {
            patch(input, seed, &mut bytes);
        }
        let is_sound = bytes == seed.bytes;
        Self { seed, bytes, is_sound }
    }
}

fn patch(input: &mut Bytes<'_>, seed: &Seed, bytes: &mut Vec<u8>) {
    let (where_, how, number) = (input.u8() as usize, input.u8(), input.u16() as usize);
    let area = match seed.areas.get(where_ % (seed.areas.len() + 2)) {
        Some(area) => area.clone(),
        None => 0..bytes.len(),
    };
    if area.is_empty() || area.end > bytes.len() {
        return;
    }
    let words = (area.len() / 8).max(1);
    let at = area.start + number % words * 8;
    let Some(old) = bytes.get(at..at + 8).map(|word| u64::from_be_bytes(word.try_into().expect("eight bytes"))) else {
        return;
    };
    let target = |input: &mut Bytes<'_>| seed.areas[input.u8() as usize % seed.areas.len()].start as u64;
    let new = match how % 10 {
        0 => input.u64(),
        1 => old ^ 1 << (input.u8() % 64),
        2 => old.wrapping_add(input.u16() as i16 as i64 as u64),
        3 => target(input) | old & 0xff00_0000_0000_0000,
        4 => target(input) | 1 << 63,
        5 => (input.u16() as u64) << seed.cluster.trailing_zeros() | u64::from(input.u8() & 0xc1) << 56,
        6 => 0,
        // One half, as many fields have 4 bytes.
        7 => old & 0xffff_ffff | u64::from(input.u32()) << 32,
        8 => old & !0xffff_ffff | u64::from(input.u32()),
        _ => {
            let end = at + 8 * (1 + input.u8() as usize % 32);
            let from = input.below(bytes.len());
            let length = (end.min(bytes.len()) - at).min(bytes.len() - from);
            bytes.copy_within(from..from + length, at);
            if input.u8() & 7 == 7 {
                bytes.truncate(from.next_multiple_of(8));
            }
            return;
        }
    };
    bytes[at..at + 8].copy_from_slice(&new.to_be_bytes());
}
