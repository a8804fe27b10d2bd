//! Changing the header of an image that is in use: its fields, its extensions, the name of its backing file.
//!
//! What decides is written last, as one sector (D1): the first 512 bytes. All else that the new header needs is written
//! and made durable before, and only to bytes of the first cluster that the OLD header does not use, so that a crash in
//! between leaves the old header with every byte that it had. (The specification keeps what lies between extensions,
//! backing file name and the end of the first cluster free for this.)

use std::ops::Range;

use super::{Header, SECTOR_BYTES, layout};
use crate::error::{Error, Result};
use crate::format::extension::{self, Extension};

/// How to get from one header to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rewrite {
    /// Runs of bytes with their offsets, to be written and made durable first. The old header does not use them.
    pub before: Vec<(u64, Vec<u8>)>,
    /// The first sector (less where clusters are no larger): one write that switches from the old to the new header.
    pub sector: Vec<u8>,
    /// The new header, as it will be parsed: its extensions may be in another order than asked for, and the feature
    /// name table may be gone.
    pub header: Header,
}

/// Bytes of the first cluster that the old header uses.
struct Used {
    area: Range<usize>, // fields and extensions
    name: Range<usize>, // of the backing file
}

impl Used {
    fn of(header: &Header, cluster: &[u8]) -> Self {
        let name_at = layout::BACKING_FILE_OFFSET.get(cluster) as usize;
        let name = match &header.backing {
            Some(backing) => name_at..name_at + backing.name.len(),
            None => 0..0,
        };
        let limit = if name.is_empty() { cluster.len() } else { name.start };
        let stored: usize = header.extensions.iter().map(Extension::stored_bytes).sum();
        let end = (header.header_length as usize + stored + extension::HEAD_BYTES).min(limit);
        Self { area: 0..end, name }
    }

    fn contains(&self, at: usize) -> bool {
        self.area.contains(&at) || self.name.contains(&at)
    }

    /// Where nothing is used any more, up to the end of the cluster.
    fn end(&self) -> usize {
        self.area.end.max(self.name.end)
    }
}

impl Header {
    /// Plans the way from the header in `cluster` (the first cluster, or the whole file if that is shorter) to `self`.
    ///
    /// `self` has the geometry and the header length of the old one; otherwise this is refused, as somebody else has
    /// written to the file. Where there is no room for a change that a crash
    /// cannot tear, the feature name table is given up, which nothing depends on; if that is not enough either, the
    /// change is refused.
    pub fn rewrite(&self, cluster: &[u8]) -> Result<Rewrite> {
        let old = Self::parse(cluster)?;
        if (old.geometry, old.header_length) != (self.geometry, self.header_length) {
            let expected =
                "the header that the image was opened with; somebody else has written another one to the file";
            let value = old.geometry.cluster_bits.into();
            return Err(Error::Header { field: "cluster_bits", value, expected });
        }
        let size = self.geometry.cluster_size_bytes() as usize;
        let mut before = cluster[..cluster.len().min(size)].to_vec();
        before.resize(size, 0);
        let used = Used::of(&old, &before);
        for extensions in self.orders(&old) {
            let header = Self { extensions, ..self.clone() };
            let mut start = header.encode_area()?;
            let name_length = header.backing.as_ref().map_or(0, |backing| backing.name.len());
            for name_at in places_for_name(start.len(), &used, name_length, size) {
                if name_at < start.len() || name_at + name_length > size {
                    continue;
                }
                let mut after = before.clone();
                if let Some(backing) = &header.backing {
                    layout::BACKING_FILE_OFFSET.set(&mut start, name_at as u64);
                    layout::BACKING_FILE_SIZE.set(&mut start, name_length as u64);
                    after[name_at..name_at + name_length].copy_from_slice(backing.name.as_bytes());
                }
                after[..start.len()].copy_from_slice(&start);
                if let Some(first) = changed_beside(&before, &after, &used) {
                    let sector = after[..size.min(SECTOR_BYTES)].to_vec();
                    return Ok(Rewrite { before: first, sector, header: Self::parse(&after)? });
                }
            }
        }
        Err(Error::TooLarge { what: "header with extensions and backing file name", limit: size as u64 })
    }

    /// The lists of extensions that would do, the best first: every one where it was, with new ones in front; those that
    /// change in front, where the next change finds them in the first sector; and that without the feature name table.
    fn orders(&self, old: &Self) -> Vec<Vec<Extension>> {
        let wanted = self.stored_extensions();
        let is_new = |e: &Extension| extension::find(&old.extensions, e.kind).is_none();
        let changes = |e: &Extension| !old.extensions.contains(e);
        let front = |first: &dyn Fn(&Extension) -> bool| {
            let (mut front, back): (Vec<_>, Vec<_>) = wanted.iter().cloned().partition(|e| first(e));
            front.extend(back);
            front
        };
        let (kept, changed_first) = (front(&is_new), front(&changes));
        let mut bare = changed_first.clone();
        bare.retain(|e| e.kind != extension::FEATURE_NAMES);
        vec![kept, changed_first, bare]
    }
}

/// Offsets at which the backing file name could be: where it is, after the extensions, after all that is used.
fn places_for_name(area_end: usize, used: &Used, length: usize, size: usize) -> Vec<usize> {
    if length == 0 {
        return vec![area_end];
    }
    let behind = used.end().max(area_end).next_multiple_of(8);
    let mut places = vec![area_end, behind, size.saturating_sub(length)];
    if !used.name.is_empty() {
        places.insert(0, used.name.start);
    }
    places
}

/// The runs of bytes that differ outside of the first sector; `None` if the old header uses one of them.
fn changed_beside(before: &[u8], after: &[u8], used: &Used) -> Option<Vec<(u64, Vec<u8>)>> {
    let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
    for at in (SECTOR_BYTES..after.len()).filter(|&at| before[at] != after[at]) {
        if used.contains(at) {
            return None;
        }
        match runs.last_mut() {
            Some((start, bytes)) if *start as usize + bytes.len() == at => bytes.push(after[at]),
            _ => runs.push((at as u64, vec![after[at]])),
        }
    }
    Some(runs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::header::tests::{backing, ext, plain};

    const BITMAPS: u32 = extension::BITMAPS;

    /// A first cluster as a header of this library leaves it.
    fn cluster_of(header: &Header) -> Vec<u8> {
        let mut bytes = header.encode().unwrap();
        bytes.resize(header.geometry.cluster_size_bytes() as usize, 0);
        bytes
    }

    /// Carries out a rewrite, and looks at what a crash may leave at each step: the old header or the new one.
    fn perform(cluster: &[u8], wanted: &Header) -> Result<(Vec<u8>, Header)> {
        let old = Header::parse(cluster).unwrap();
        let rewrite = wanted.rewrite(cluster)?;
        let mut bytes = cluster.to_vec();
        bytes.resize(wanted.geometry.cluster_size_bytes() as usize, 0);
        // Any subset of the sectors may be there; all that matters is that each byte is old or new.
        for seed in 0..16u32 {
            let mut torn = bytes.clone();
            for (at, run) in &rewrite.before {
                for (i, &byte) in run.iter().enumerate() {
                    let sector = (*at as usize + i) / SECTOR_BYTES;
                    if seed >> (sector % 4) & 1 == 1 {
                        torn[*at as usize + i] = byte;
                    }
                }
            }
            assert_eq!(Header::parse(&torn).unwrap(), old, "before the first sector is written");
        }
        for (at, run) in &rewrite.before {
            assert!(*at as usize >= SECTOR_BYTES);
            bytes[*at as usize..*at as usize + run.len()].copy_from_slice(run);
        }
        bytes[..rewrite.sector.len()].copy_from_slice(&rewrite.sector);
        let found = Header::parse(&bytes).unwrap();
        assert_eq!(found, rewrite.header, "after it");
        let sorted = |header: &Header, with_names: bool| {
            let mut list: Vec<(u32, Vec<u8>)> =
                header.stored_extensions().into_iter().map(|e| (e.kind, e.data)).collect();
            list.retain(|(kind, _)| with_names || *kind != extension::FEATURE_NAMES);
            list.sort();
            list
        };
        let same = |with_names| sorted(&found, with_names) == sorted(wanted, with_names);
        assert!(same(true) || extension::find(&found.extensions, extension::FEATURE_NAMES).is_none() && same(false));
        let fields = |header: &Header| Header { extensions: Vec::new(), ..header.clone() };
        assert_eq!(fields(&found), fields(wanted));
        Ok((bytes, found))
    }

    fn with(header: &Header, kind: u32, data: Option<&[u8]>) -> Header {
        let mut header = header.clone();
        header.set_extension(kind, data.map(<[u8]>::to_vec));
        header
    }

    #[test]
    fn an_extension_comes_changes_and_goes() {
        let mut names = plain(3);
        names.extensions = vec![extension::feature_names()];
        let mut in_front = names.clone();
        in_front.backing = backing("base.qcow2", Some("qcow2"));
        let mut unknown = plain(3);
        unknown.extensions = vec![ext(0x7777, &[1; 100]), ext(0x7777, &[2; 9])];
        for start in [plain(3), names, in_front, unknown] {
            let (cluster, header) = perform(&cluster_of(&start), &with(&start, BITMAPS, Some(&[3; 24]))).unwrap();
            let (cluster, header) = perform(&cluster, &with(&header, BITMAPS, Some(&[4; 24]))).unwrap();
            // From the second change on it is a matter of one sector.
            assert_eq!(with(&header, BITMAPS, Some(&[5; 24])).rewrite(&cluster).unwrap().before, []);
            let (_, header) = perform(&cluster, &with(&header, BITMAPS, None)).unwrap();
            assert_eq!(header.backing, start.backing);
        }
    }

    #[test]
    fn a_table_of_names_that_is_in_the_way_is_given_up() {
        // As QEMU arranges it: the names first, so that the bitmaps lie across the end of the first sector.
        let mut header = plain(3);
        header.extensions = vec![extension::feature_names(), ext(BITMAPS, &[1; 24])];
        let (_, found) = perform(&cluster_of(&header), &with(&header, BITMAPS, Some(&[2; 24]))).unwrap();
        assert_eq!(found.extensions, [ext(BITMAPS, &[2; 24])]);
    }

    #[test]
    fn the_backing_file_name_moves_out_of_the_way() {
        let mut header = plain(3);
        header.backing = backing("base", Some("raw"));
        let long = vec![7; 300];
        let (cluster, found) = perform(&cluster_of(&header), &with(&header, 0x9999, Some(&long))).unwrap();
        assert_eq!(found.backing, header.backing);
        let mut renamed = found.clone();
        renamed.backing = backing(&"n".repeat(1023), Some("qcow2"));
        let (cluster, found) = perform(&cluster, &renamed).unwrap();
        let mut none = found.clone();
        none.backing = None;
        let (_, found) = perform(&cluster, &with(&none, extension::BACKING_FORMAT, None)).unwrap();
        assert_eq!(found.extensions, [ext(0x9999, &long)]);
    }

    /// A storage in which somebody else had made another image meanwhile: in a debug build an assertion failed, and otherwise
    /// the new header was planned over the other image. Found by fuzzing C calls.
    #[test]
    fn the_header_of_another_image_is_not_rewritten() {
        let (ours, mut others) = (plain(3), plain(3));
        others.geometry.cluster_bits = 9;
        others.l1_entries = 1 << 10;
        let e = with(&ours, BITMAPS, Some(&[1; 24])).rewrite(&cluster_of(&others)).unwrap_err();
        assert!(matches!(e, Error::Header { field: "cluster_bits", value: 9, .. }), "{e}");
        assert!(e.to_string().contains("somebody else"), "{e}");
    }

    #[test]
    fn what_has_no_room_is_refused_by_name() {
        let mut small = plain(3);
        small.geometry.cluster_bits = 9;
        small.l1_entries = 1 << 10;
        small.backing = backing(&"b".repeat(300), None);
        let e = with(&small, 0x9999, Some(&[1; 100])).rewrite(&cluster_of(&small)).unwrap_err();
        assert!(matches!(e, Error::TooLarge { limit: 512, .. }), "{e}");
        // Unknown extensions that fill the second sector can be neither moved nor given up.
        let mut full = plain(3);
        full.extensions = vec![ext(0x7777, &[1; 800]), ext(BITMAPS, &[2; 24])];
        let cluster = cluster_of(&full);
        let e = with(&full, BITMAPS, Some(&[3; 24])).rewrite(&cluster).unwrap_err();
        assert!(matches!(e, Error::TooLarge { limit: 4096, .. }), "{e}");
    }

    #[test]
    fn version_2_headers_and_files_that_end_with_them() {
        let mut header = plain(2);
        header.backing = backing("b", Some("qcow2"));
        let (cluster, found) = perform(&header.encode().unwrap(), &with(&header, 0x1234, Some(b"x"))).unwrap();
        assert_eq!(extension::find(&found.extensions, 0x1234), Some(&b"x"[..]));
        let mut renamed = found.clone();
        renamed.backing = backing("other", None);
        perform(&cluster, &renamed).unwrap();
    }

    #[test]
    fn many_changes_in_a_row() {
        let mut word = 1u64;
        let mut next = move |n: u64| {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (word >> 33) % n
        };
        let (mut done, mut refused) = (0, 0);
        for _ in 0..60 {
            let mut header = plain(3);
            if next(2) == 0 {
                header.extensions.push(extension::feature_names());
            }
            if next(2) == 0 {
                header.backing = backing(&"b".repeat(1 + next(900) as usize), Some("raw"));
            }
            let mut cluster = cluster_of(&header);
            let mut header = Header::parse(&cluster).unwrap();
            for _ in 0..30 {
                let mut wanted = header.clone();
                match next(5) {
                    0 => wanted.backing = backing(&"c".repeat(1 + next(1000) as usize), Some("qcow2")),
                    1 => wanted.backing = None,
                    2 => wanted.size_bytes = next(4096) * 512,
                    3 => wanted.set_extension(BITMAPS, Some(vec![next(256) as u8; 24])),
                    _ => {
                        let data = (next(3) > 0).then(|| vec![next(256) as u8; next(700) as usize]);
                        wanted.set_extension(0x1000 + next(4) as u32, data);
                    }
                }
                match perform(&cluster, &wanted) {
                    Ok(changed) => ((cluster, header), done) = (changed, done + 1),
                    Err(Error::TooLarge { .. }) => refused += 1,
                    Err(other) => panic!("{other}"),
                }
            }
        }
        assert!(done > 1000 && refused > 20, "{done} done, {refused} refused");
    }
}
