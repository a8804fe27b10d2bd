//! Bitmap directory, bitmap tables, and how many bits a bitmap has. Spec, "Bitmaps".

use std::collections::HashSet;

use super::extension::{BitmapsPointer, text};
use super::geometry::Geometry;
use super::units::HostOffset;
use crate::error::{Error, Result};

/// Most bitmaps of an image (as QEMU).
pub const BITMAPS_MAX: u64 = 65535;
/// Largest bitmap directory in bytes (as QEMU).
pub const DIRECTORY_BYTES_MAX: u64 = 1024 * BITMAPS_MAX;
/// Largest bitmap in bytes, counted in whole clusters (as QEMU).
pub const BITMAP_BYTES_MAX: u64 = 512 << 20;
/// Longest name in bytes (as QEMU).
pub const NAME_MAX: usize = 1023;
/// Smallest granularity that QEMU supports: 512 bytes.
pub const GRANULARITY_BITS_MIN: u32 = 9;
/// Largest granularity that QEMU supports: 2 GiB.
pub const GRANULARITY_BITS_MAX: u32 = 31;

/// A directory entry before its extra data, name and padding.
const ENTRY_BYTES: usize = 24;
const FLAG_IN_USE: u32 = 1;
const FLAG_AUTO: u32 = 2;
const FLAG_EXTRA_DATA_COMPATIBLE: u32 = 4;
const TYPE_DIRTY_TRACKING: u8 = 1;

/// Bits of a bitmap table entry that are an offset.
const TABLE_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Without an offset: the cluster reads as all ones.
const TABLE_ALL_ONES: u64 = 1;

/// One bitmap as the directory describes it. Spec, "Bitmap directory".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapEntry {
    /// Its name, unique in the image.
    pub name: String,
    /// log2 of the guest bytes that one bit stands for.
    pub granularity_bits: u32,
    /// It was not saved after its last use: what it says may be out of date.
    pub in_use: bool,
    /// Enabled: it has to reflect every change of the guest disk.
    pub auto: bool,
    /// Whoever does not know the extra data may use the bitmap all the same.
    pub extra_data_compatible: bool,
    /// Data of which only the length is specified.
    pub extra_data: Vec<u8>,
    /// Its bitmap table.
    pub table_offset: HostOffset,
    /// Entries of the bitmap table, one for each cluster of bits.
    pub table_entries: u32,
}

/// What a bitmap table says about one cluster of bits. Spec, "Bitmap table".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitsAt {
    /// No bit of it is set.
    Zeroes,
    /// All of its bits are set.
    Ones,
    /// They are stored here.
    Cluster(HostOffset),
}

impl BitsAt {
    /// From a table entry; `None` if it has reserved bits set or is not aligned.
    pub fn decode(entry: u64, geometry: Geometry) -> Option<Self> {
        let offset = entry & TABLE_OFFSET;
        match entry & !TABLE_OFFSET {
            0 if offset == 0 => Some(Self::Zeroes),
            TABLE_ALL_ONES if offset == 0 => Some(Self::Ones),
            0 if offset.is_multiple_of(geometry.cluster_size_bytes()) => Some(Self::Cluster(HostOffset(offset))),
            _ => None,
        }
    }

    /// To a table entry.
    pub fn encode(self) -> u64 {
        match self {
            Self::Zeroes => 0,
            Self::Ones => TABLE_ALL_ONES,
            Self::Cluster(at) => at.0,
        }
    }
}

/// Bits of a bitmap for a disk of `size_bytes`.
pub fn bits_for(size_bytes: u64, granularity_bits: u32) -> u64 {
    size_bytes.div_ceil(1 << granularity_bits)
}

/// Entries of the table of such a bitmap: one for each cluster of its bits.
pub fn table_entries_for(size_bytes: u64, granularity_bits: u32, geometry: Geometry) -> u64 {
    geometry.clusters_for(bits_for(size_bytes, granularity_bits).div_ceil(8))
}

/// The granularity that QEMU gives a bitmap if nobody asks for another: the cluster size, but 4 KiB to 64 KiB.
pub fn default_granularity_bits(geometry: Geometry) -> u32 {
    geometry.cluster_bits.clamp(12, 16)
}

impl BitmapEntry {
    /// What forbids using the bits, beyond [`BitmapEntry::in_use`]; it is kept as it is then.
    pub fn unusable(&self, size_bytes: u64, geometry: Geometry) -> Option<&'static str> {
        if !self.extra_data.is_empty() && !self.extra_data_compatible {
            return Some("it has extra data that this version does not know, and that is not marked as compatible");
        }
        if !(GRANULARITY_BITS_MIN..=GRANULARITY_BITS_MAX).contains(&self.granularity_bits) {
            return Some("its granularity is not between 512 bytes and 2 GiB");
        }
        if u64::from(self.table_entries) * geometry.cluster_size_bytes() > BITMAP_BYTES_MAX {
            return Some("it is larger than 512 MiB");
        }
        if u64::from(self.table_entries) != table_entries_for(size_bytes, self.granularity_bits, geometry) {
            return Some("its size is not that of the disk");
        }
        None
    }

    /// Bytes of its table.
    pub fn table_bytes(&self) -> u64 {
        u64::from(self.table_entries) * 8
    }

    /// Bytes that it takes in the directory.
    pub fn encoded_bytes(&self) -> usize {
        (ENTRY_BYTES + self.extra_data.len() + self.name.len()).next_multiple_of(8)
    }

    fn flags(&self) -> u32 {
        let bit = |on: bool, flag: u32| if on { flag } else { 0 };
        bit(self.in_use, FLAG_IN_USE)
            | bit(self.auto, FLAG_AUTO)
            | bit(self.extra_data_compatible, FLAG_EXTRA_DATA_COMPATIBLE)
    }

    /// Appends the entry as it is stored.
    fn encode(&self, to: &mut Vec<u8>) {
        let end = to.len() + self.encoded_bytes();
        to.extend_from_slice(&self.table_offset.0.to_be_bytes());
        to.extend_from_slice(&self.table_entries.to_be_bytes());
        to.extend_from_slice(&self.flags().to_be_bytes());
        to.extend_from_slice(&[TYPE_DIRTY_TRACKING, self.granularity_bits as u8]);
        to.extend_from_slice(&(self.name.len() as u16).to_be_bytes());
        to.extend_from_slice(&(self.extra_data.len() as u32).to_be_bytes());
        to.extend_from_slice(&self.extra_data);
        to.extend_from_slice(self.name.as_bytes());
        to.resize(end, 0);
    }

    /// The entry at the start of `bytes`, number `index` of its directory, and the length that it takes.
    fn parse(bytes: &[u8], index: u32, geometry: Geometry) -> Result<(Self, usize)> {
        let wrong = |field, value, expected| Err(Error::BitmapDirectory { entry: index, field, value, expected });
        if bytes.len() < ENTRY_BYTES {
            return wrong("bitmap_directory_size", bytes.len() as u64, "24 bytes more where an entry begins");
        }
        let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let table_offset = u64::from(word(0)) << 32 | u64::from(word(4));
        let (table_entries, flags) = (word(8), word(12));
        let (kind, granularity_bits) = (bytes[16], u32::from(bytes[17]));
        let name_size = usize::from(u16::from_be_bytes([bytes[18], bytes[19]]));
        let extra_size = word(20) as usize;
        if table_offset == 0 || table_offset & !TABLE_OFFSET != 0 || table_offset % geometry.cluster_size_bytes() != 0 {
            return wrong("bitmap_table_offset", table_offset, "a multiple of the cluster size, and not 0");
        }
        if table_entries == 0 {
            return wrong("bitmap_table_size", 0, "at least 1");
        }
        if flags & !(FLAG_IN_USE | FLAG_AUTO | FLAG_EXTRA_DATA_COMPATIBLE) != 0 {
            return wrong("flags", flags.into(), "bits 3 to 31 to be 0");
        }
        if kind != TYPE_DIRTY_TRACKING {
            return wrong("type", kind.into(), "1 (dirty tracking bitmap)");
        }
        if granularity_bits > 63 {
            return wrong("granularity_bits", granularity_bits.into(), "0 to 63");
        }
        if name_size == 0 || name_size > NAME_MAX {
            return wrong("name_size", name_size as u64, "1 to 1023");
        }
        // At most 4 GiB and 1 KiB: no overflow.
        let (name_at, end) = (ENTRY_BYTES + extra_size, ENTRY_BYTES + extra_size + name_size);
        let padded = end.next_multiple_of(8);
        if padded > bytes.len() {
            return wrong("extra_data_size", extra_size as u64, "an entry that ends inside of the directory");
        }
        let name = match text(&bytes[name_at..end], "name") {
            Ok(name) => name,
            Err(Error::Header { field, value, expected }) => return wrong(field, value, expected),
            Err(other) => return Err(other),
        };
        let entry = Self {
            name,
            granularity_bits,
            in_use: flags & FLAG_IN_USE != 0,
            auto: flags & FLAG_AUTO != 0,
            extra_data_compatible: flags & FLAG_EXTRA_DATA_COMPATIBLE != 0,
            extra_data: bytes[ENTRY_BYTES..name_at].to_vec(),
            table_offset: HostOffset(table_offset),
            table_entries,
        };
        Ok((entry, padded))
    }
}

/// Reads the bitmap directory. `bytes` are the [`BitmapsPointer::directory_bytes`] that the extension speaks of.
pub fn parse_directory(bytes: &[u8], pointer: BitmapsPointer, geometry: Geometry) -> Result<Vec<BitmapEntry>> {
    let mut entries = Vec::new();
    let mut names = HashSet::new();
    let mut rest = bytes;
    for index in 0..pointer.count {
        let (entry, length) = BitmapEntry::parse(rest, index, geometry)?;
        if !names.insert(entry.name.clone()) {
            let value = entry.name.len() as u64;
            return Err(Error::BitmapDirectory { entry: index, field: "name", value, expected: "a name of its own" });
        }
        entries.push(entry);
        rest = &rest[length..];
    }
    if !rest.is_empty() {
        return Err(Error::BitmapDirectory {
            entry: pointer.count,
            field: "bitmap_directory_size",
            value: bytes.len() as u64,
            expected: "the directory to end with its last entry",
        });
    }
    Ok(entries)
}

/// The directory as it is stored.
pub fn encode_directory(entries: &[BitmapEntry]) -> Result<Vec<u8>> {
    let length: u64 = entries.iter().map(|entry| entry.encoded_bytes() as u64).sum();
    if entries.len() as u64 > BITMAPS_MAX {
        return Err(Error::TooLarge { what: "number of bitmaps", limit: BITMAPS_MAX });
    }
    if length > DIRECTORY_BYTES_MAX {
        return Err(Error::TooLarge { what: "bitmap directory", limit: DIRECTORY_BYTES_MAX });
    }
    let mut bytes = Vec::with_capacity(length as usize);
    entries.iter().for_each(|entry| entry.encode(&mut bytes));
    Ok(bytes)
}

#[cfg(test)]
mod tests;
