//! Dirty bitmaps, read by the judge itself.

use super::layout::Layout;

/// A bitmap as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBitmap {
    pub name: String,
    pub granularity: u64,
    pub in_use: bool,
    pub auto: bool,
    /// Host offset of its table, and the entries of the table.
    pub table_offset: u64,
    pub table: Vec<u64>,
    /// Bits in all: one for each granule of the disk.
    pub bits: u64,
}

impl StoredBitmap {
    fn bit(&self, layout: &Layout<'_>, n: u64) -> bool {
        let byte = n / 8;
        match self.table.get((byte / layout.cluster()) as usize).copied().unwrap_or(0) {
            entry if entry & 0x00ff_ffff_ffff_fe00 == 0 => entry & 1 == 1,
            host => {
                let found = layout.image.part(host + byte % layout.cluster(), 1);
                found.first().is_some_and(|b| b >> (n % 8) & 1 == 1)
            }
        }
    }

    /// The bit of a guest sector.
    pub fn is_dirty(&self, layout: &Layout<'_>, sector: u64) -> bool {
        self.bit(layout, sector * 512 / self.granularity)
    }

    /// Guest offsets of the granules that are dirty.
    pub fn dirty(&self, layout: &Layout<'_>) -> Vec<u64> {
        (0..self.bits).filter(|&n| self.bit(layout, n)).map(|n| n * self.granularity).collect()
    }
}

/// Where the directory is, by the header extension: offset, length, number of bitmaps. `None` if the autoclear bit says
/// that it does not count.
pub fn directory(layout: &Layout<'_>) -> Result<Option<(u64, u64, u64)>, String> {
    let word = |at: u64| layout.u64(at) >> 32;
    if layout.version < 3 || layout.u64(88) & 1 == 0 {
        return Ok(None);
    }
    let mut at = word(100);
    let name_at = layout.u64(8);
    let end = if name_at == 0 { layout.cluster().min(layout.image.end()) } else { name_at };
    while at + 8 <= end && word(at) != 0 {
        if word(at) == 0x2385_2875 {
            if word(at + 4) != 24 || word(at + 12) != 0 {
                return Err("malformed bitmaps extension".into());
            }
            return Ok(Some((layout.u64(at + 24), layout.u64(at + 16), word(at + 8))));
        }
        at += 8 + word(at + 4).next_multiple_of(8);
    }
    Err("the autoclear bit of the bitmaps is set without the extension".into())
}

/// All bitmaps of an image, by the rules of the specification.
pub fn bitmaps(layout: &Layout<'_>) -> Result<Vec<StoredBitmap>, String> {
    let Some((offset, length, count)) = directory(layout)? else { return Ok(Vec::new()) };
    if !offset.is_multiple_of(layout.cluster()) || offset == 0 || offset + length > layout.image.size {
        return Err(format!("D2: bitmap directory at 0x{offset:x} is unaligned or outside of the file"));
    }
    let mut at = offset;
    let mut found: Vec<StoredBitmap> = Vec::new();
    for number in 0..count {
        if at + 24 > offset + length {
            return Err(format!("the bitmap directory ends before entry {number}"));
        }
        let bitmap = entry(layout, at)?;
        if found.iter().any(|other| other.name == bitmap.name) {
            return Err(format!("two bitmaps are called {}", bitmap.name));
        }
        let (extra, name) = (layout.u64(at + 16) & 0xffff_ffff, layout.u64(at + 16) >> 32 & 0xffff);
        at += (24 + extra + name).next_multiple_of(8);
        found.push(bitmap);
    }
    if at != offset + length {
        return Err("the bitmap directory is longer than its entries".into());
    }
    Ok(found)
}

fn entry(layout: &Layout<'_>, at: u64) -> Result<StoredBitmap, String> {
    let table_offset = layout.u64(at);
    let (entries, flags) = (layout.u64(at + 8) >> 32, layout.u64(at + 8) & 0xffff_ffff);
    let word = layout.u64(at + 16);
    let (kind, granularity_bits) = (word >> 56, word >> 48 & 0xff);
    let (name_size, extra) = (word >> 32 & 0xffff, word & 0xffff_ffff);
    if at + 24 + extra + name_size > layout.image.size {
        return Err("a name outside of the file".into());
    }
    let mut name = vec![0; name_size as usize];
    layout.image.read(at + 24 + extra, &mut name);
    let name = String::from_utf8(name).map_err(|_| "a name that is no text")?;
    let size = layout.trees[0].guest_size;
    if kind != 1 || flags & !7 != 0 || granularity_bits > 63 || name.is_empty() {
        return Err(format!("malformed entry of bitmap {name}"));
    }
    let in_use = flags & 1 != 0;
    let bits = size.div_ceil(1 << granularity_bits);
    if !in_use && entries != bits.div_ceil(8 * layout.cluster()) {
        return Err(format!("bitmap {name} has {entries} clusters for {bits} bits"));
    }
    let table: Vec<u64> = (0..entries).map(|i| layout.u64(table_offset + i * 8)).collect();
    if !in_use {
        check_tail(layout, &table, bits).map_err(|why| format!("bitmap {name}: {why}"))?;
    }
    Ok(StoredBitmap {
        name,
        granularity: 1 << granularity_bits,
        in_use,
        auto: flags & 2 != 0,
        table_offset,
        table,
        bits,
    })
}

/// Unused bits of the last cluster are zero.
fn check_tail(layout: &Layout<'_>, table: &[u64], bits: u64) -> Result<(), String> {
    let Some(&last) = table.last().filter(|last| **last & 0x00ff_ffff_ffff_fe00 != 0) else { return Ok(()) };
    let start = (table.len() as u64 - 1) * layout.cluster() * 8;
    let host = last & 0x00ff_ffff_ffff_fe00;
    let (first, mut found) = (bits - start, None);
    layout.words(host, layout.cluster() / 8, &mut |index, word| {
        // Bit n of a bitmap is bit n % 8 of its byte.
        let unused = |within: &u64| {
            let n = index * 64 + within;
            n >= first && word >> (56 - within / 8 * 8 + within % 8) & 1 == 1
        };
        if index * 64 + 63 >= first {
            found = found.or((0..64).find(unused).map(|within| index * 64 + within));
        }
    });
    if let Some(n) = found {
        return Err(format!("unused bit {n} of the last cluster is set"));
    }
    Ok(())
}
