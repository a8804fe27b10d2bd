//! What is damaged, and how far each damage reaches.

use std::ops::Range;

use qcow2::format::Header;
use qcow2::storage::sim::DiskImage;

use crate::fixture::Fixture;
use crate::guarded::END;
use crate::judge::Layout;

/// What a damaged place is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Header,
    L1,
    L2,
    RefcountTable,
    RefcountBlock,
    Compressed,
}

/// A place to damage.
#[derive(Debug, Clone)]
pub struct Site {
    pub part: Part,
    /// Host bytes to damage.
    pub bytes: Range<usize>,
    /// Guest bytes that the structure describes.
    pub guest: Vec<Range<u64>>,
}

/// One damage of a site.
#[derive(Debug, Clone, Copy)]
pub enum Damage {
    /// Flip this bit of the site.
    Flip(usize),
    /// Put this value in place of the 8 bytes at this offset of the site.
    Word(usize, u64),
}

impl Damage {
    /// The damaged image.
    pub fn apply(self, bytes: &[u8], site: &Site) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        match self {
            Self::Flip(bit) => bytes[site.bytes.start + bit / 8] ^= 0x80 >> (bit % 8),
            Self::Word(at, value) => bytes[site.bytes.start + at..][..8].copy_from_slice(&value.to_be_bytes()),
        }
        bytes
    }
}

/// All damages of a site: each bit, and each word of metadata at its boundaries.
pub fn damages(fixture: &Fixture, site: &Site) -> Vec<Damage> {
    let mut list: Vec<Damage> = (0..site.bytes.len() * 8).map(Damage::Flip).collect();
    if site.part != Part::Compressed {
        for at in (0..site.bytes.len()).step_by(8).filter(|at| at + 8 <= site.bytes.len()) {
            list.extend(boundaries(fixture).into_iter().map(|value| Damage::Word(at, value)));
        }
    }
    list
}

/// Values at which something ends, for words of any kind.
fn boundaries(fixture: &Fixture) -> [u64; 24] {
    let (cluster, size) = (fixture.cluster, fixture.bytes.len() as u64);
    let end = size.next_multiple_of(cluster);
    [
        0,
        1,
        2,
        511,
        512,
        cluster,
        cluster | 1 << 63,
        end - cluster,
        end | 1 << 63,
        size - 1,
        END,
        END - cluster,
        u32::MAX.into(),
        1 << 32,
        0x00ff_ffff_ffff_fe00 & !(cluster - 1),
        0x80ff_ffff_ffff_fe00 & !(cluster - 1),
        1 << 56,
        1 << 62,
        1 << 62 | (size - 1),
        3 << 62,
        1 << 63,
        i64::MAX as u64,
        u64::MAX,
        !(cluster - 1),
    ]
}

/// Every structure of the image that the engine reads.
pub fn sites(fixture: &Fixture) -> Vec<Site> {
    let image = DiskImage::new(fixture.bytes.clone());
    let layout = Layout::parse(&image).unwrap();
    let cluster = layout.cluster();
    let word = |part, at: u64, length: u64, guest: Vec<Range<u64>>| Site {
        part,
        bytes: at as usize..(at + length) as usize,
        guest,
    };
    let used = fixture.bytes[..cluster as usize].iter().rposition(|b| *b != 0).unwrap() + 1;
    let header = (used.next_multiple_of(8) as u64).max(112);
    let mut list: Vec<Site> = (0..header / 8).map(|i| word(Part::Header, i * 8, 8, vec![everything()])).collect();
    let covers = layout.l2_entries() * cluster;
    let mut compressed: Vec<(Range<u64>, Range<u64>)> = Vec::new(); // host and guest bytes
    for l1 in 0..layout.l1_entries {
        let at = layout.l1_offset + l1 * 8;
        list.push(word(Part::L1, at, 8, std::iter::once(l1 * covers..(l1 + 1) * covers).collect()));
        let table = layout.u64(at) & 0x00ff_ffff_ffff_fe00;
        let mut unused = 2; // entries that are not used, but may become so
        for index in 0..if table == 0 { 0 } else { layout.l2_entries() } {
            let at = table + index * layout.l2_entry_bytes();
            let entry = layout.entry_at(at);
            let guest = (l1 * covers + index * cluster)..(l1 * covers + (index + 1) * cluster);
            if entry.descriptor == 0 && entry.bitmap == 0 {
                if unused == 0 {
                    continue;
                }
                unused -= 1;
            }
            if entry.descriptor >> 62 & 1 == 1 {
                let (offset, length) = layout.compressed_extent(entry.descriptor);
                compressed.push((offset..(offset + length).min(image.size), guest.clone()));
            }
            list.push(word(Part::L2, at, layout.l2_entry_bytes(), vec![guest]));
        }
    }
    refcount_sites(&layout, fixture.bytes.len() as u64, &mut list);
    compressed_sites(fixture, &compressed, &mut list);
    list
}

fn refcount_sites(layout: &Layout<'_>, size: u64, list: &mut Vec<Site>) {
    let per_block = (layout.cluster() * 8) >> layout.refcount_order;
    for index in 0..size.div_ceil(layout.cluster()).div_ceil(per_block) + 1 {
        let at = layout.refcount_table_offset + index * 8;
        list.push(Site { part: Part::RefcountTable, bytes: at as usize..at as usize + 8, guest: Vec::new() });
        let block = layout.u64(at);
        if block == 0 {
            continue;
        }
        let mut last = 0;
        layout.counted(block, &mut |entry, _| last = entry);
        // Up to the first count that is 0 behind the last one that is not, in whole words.
        let length = ((last + 2) << layout.refcount_order).div_ceil(64).min(layout.cluster() / 8) * 8;
        for word in (block..block + length).step_by(8) {
            let bytes = word as usize..word as usize + 8;
            list.push(Site { part: Part::RefcountBlock, bytes, guest: Vec::new() });
        }
    }
}

/// The compressed bytes, each with all clusters whose extent it is in.
fn compressed_sites(fixture: &Fixture, compressed: &[(Range<u64>, Range<u64>)], list: &mut Vec<Site>) {
    let first = compressed.iter().map(|(host, _)| host.start).min().unwrap();
    let last = compressed.iter().map(|(host, _)| host.end).max().unwrap();
    let stored = &fixture.bytes[first as usize..last as usize];
    let used = stored.iter().rposition(|b| *b != 0).unwrap() as u64 + 2;
    for at in first..(first + used).min(last) {
        let guest = compressed.iter().filter(|(host, _)| host.contains(&at)).map(|(_, guest)| guest.clone()).collect();
        list.push(Site { part: Part::Compressed, bytes: at as usize..at as usize + 1, guest });
    }
}

/// All guest bytes.
pub fn everything() -> Range<u64> {
    0..u64::MAX
}

/// Guest bytes that damage may change.
pub struct Reach {
    /// As long as nothing is written.
    pub reads: Vec<Range<u64>>,
    /// Once `writes` have been written.
    pub writes: Vec<Range<u64>>,
}

/// How far a damage reaches. `header`: of the damaged image.
pub fn reach(fixture: &Fixture, site: &Site, damaged: &[u8], header: &Header, writes: &[Range<u64>]) -> Reach {
    let all = || vec![everything()];
    let none = Vec::new;
    match site.part {
        Part::Header => {
            let sound = Header::parse(&fixture.bytes[..fixture.bytes.len().min(fixture.cluster as usize)]).unwrap();
            let format = |h: &Header| h.backing.as_ref().map(|b| b.format.clone());
            let tree = |h: &Header| (h.size_bytes, h.l1_offset, h.l1_entries, h.compression, format(h));
            let shape = |h: &Header| (h.geometry.version, h.geometry.cluster_bits, h.geometry.extended_l2);
            let counts = |h: &Header| {
                let table = (h.refcount_table_offset, h.refcount_table_clusters);
                (table, h.snapshots, h.snapshots_offset, h.geometry.refcount_order)
            };
            let reads = if tree(&sound) == tree(header) && shape(&sound) == shape(header) { none() } else { all() };
            let writes = if reads.is_empty() && counts(&sound) == counts(header) { none() } else { all() };
            Reach { reads, writes }
        }
        Part::L1 | Part::L2 => {
            let word = |bytes: &[u8]| u64::from_be_bytes(bytes[site.bytes.start..][..8].try_into().unwrap());
            // Another host offset (or compressed extent) is perhaps somebody else's: writes may go there.
            let moved = (word(&fixture.bytes) ^ word(damaged)) & 0x7fff_ffff_ffff_fe00 != 0;
            let touched = writes.iter().any(|w| site.guest.iter().any(|g| w.start < g.end && g.start < w.end));
            Reach { reads: site.guest.clone(), writes: if moved && touched { all() } else { site.guest.clone() } }
        }
        Part::Compressed => Reach { reads: site.guest.clone(), writes: site.guest.clone() },
        Part::RefcountTable => Reach { reads: none(), writes: all() },
        Part::RefcountBlock => {
            let image = DiskImage::new(fixture.bytes.clone());
            let layout = Layout::parse(&image).unwrap();
            let bits = 1usize << layout.refcount_order;
            // A used cluster that counts as free may be handed out: what that does is not bounded by a guest range.
            let lost = |bytes: &[u8]| -> Vec<bool> {
                let word = &bytes[site.bytes.clone()];
                let is_set = |bit: usize| word[bit / 8] >> (bit % 8) & 1 == 1;
                (0..64 / bits).map(|i| (i * bits..(i + 1) * bits).any(is_set)).collect()
            };
            let lost = lost(&fixture.bytes).iter().zip(lost(damaged)).any(|(before, after)| *before && !after);
            Reach { reads: none(), writes: if lost { all() } else { none() } }
        }
    }
}
