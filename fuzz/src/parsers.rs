//! Each parser by itself, on bytes as they are: header and extensions, snapshot table, bitmap directory, L2 entries,
//! refcount blocks, compressed clusters. What is accepted and encoded again is what was there.

use qcow2::codec::Codec;
use qcow2::format::bitmap::{encode_directory, parse_directory};
use qcow2::format::extension::BitmapsPointer;
use qcow2::format::snapshot::{Parsed, Snapshot};
use qcow2::format::{Compression, Geometry, GuestCluster, Header, Host, L2Entry, l2_table, refcount};
use qcow2::image::info::Info;

use crate::bytes::Bytes;
use crate::heap::limited;
use crate::rule;

/// Compressed data may stand for a cluster of 2 MiB.
const HEAP_MAX: usize = 32 << 20;

/// Runs one parser.
pub fn parsers(input: &[u8]) {
    let mut input = Bytes::new(input);
    let which = input.u8();
    limited(HEAP_MAX, || match which % 7 {
        0 => header(input.rest()),
        1 => snapshots(input.rest()),
        2 => bitmaps(&mut input),
        3 => l2(&mut input),
        4 => counts(&mut input),
        5 => stored(&mut input),
        _ => loads(&mut input),
    });
}

fn geometry(input: &mut Bytes<'_>) -> Geometry {
    let extended_l2 = input.u8() & 1 == 1;
    let cluster_bits = u32::from(input.u8()) % 13 + 9;
    Geometry {
        version: 2 + u32::from(input.u8() & 1 | u8::from(extended_l2)),
        cluster_bits: if extended_l2 { cluster_bits.max(14) } else { cluster_bits },
        extended_l2,
        refcount_order: u32::from(input.u8()) % 7,
    }
}

fn header(bytes: &[u8]) {
    let lenient = Header::parse_leniently(bytes.to_vec());
    let Ok(header) = Header::parse(bytes) else { return };
    rule!(lenient.as_ref() == Ok(&header), "read leniently it is another one");
    let _ = header.check_supported();
    let _ = header.check_known();
    let _ = header.check_placement(bytes.len() as u64);
    let json = Info::new(&header, bytes.len() as u64, None).to_json("image");
    rule!(json.starts_with('{'), "no JSON: {json}");
    let _ = header.data_file_name();
    // Unknown parts are kept: encoded and read again it is the same header.
    if let Ok(encoded) = header.encode()
        && encoded.len() <= 1 << header.geometry.cluster_bits
    {
        let again = Header::parse(&encoded);
        rule!(again.as_ref() == Ok(&header), "encoded and read again: {header:?} {again:?}");
    }
    let rewritten = header.rewrite(&bytes[..bytes.len().min(1 << header.geometry.cluster_bits)]);
    if let Ok(rewritten) = rewritten {
        rule!(rewritten.header.size_bytes == header.size_bytes, "rewriting changes the size");
    }
}

fn snapshots(bytes: &[u8]) {
    let mut rest = bytes;
    for entry in 0..200 {
        match Snapshot::parse(rest, entry) {
            Ok(Parsed::Entry(snapshot, length)) => {
                let mut encoded = Vec::new();
                snapshot.encode(&mut encoded).unwrap_or_else(|e| panic!("read, but not to be written: {e}"));
                let again = Snapshot::parse(&encoded, entry);
                let is_same = matches!(&again, Ok(Parsed::Entry(again, _)) if *again == snapshot);
                rule!(is_same, "encoded and read again: {snapshot:?}");
                let _ = (snapshot.disk_bytes(), snapshot.vm_state_bytes(), snapshot.icount());
                let Some(next) = rest.get(length..) else { return };
                rest = next;
            }
            Ok(Parsed::Short(needed)) => {
                rule!(needed > rest.len(), "{needed} bytes are wanted, and there are {}", rest.len());
                return;
            }
            Err(_) => return,
        }
    }
}

fn bitmaps(input: &mut Bytes<'_>) {
    let (geometry, count) = (geometry(input), u32::from(input.u8()));
    let bytes = input.rest();
    let pointer = BitmapsPointer { count, directory_bytes: bytes.len() as u64, directory_offset: 0 };
    if let Ok(entries) = parse_directory(bytes, pointer, geometry) {
        rule!(entries.len() == count as usize, "{count} entries became {}", entries.len());
        if let Ok(encoded) = encode_directory(&entries) {
            let pointer = BitmapsPointer { directory_bytes: encoded.len() as u64, ..pointer };
            let again = parse_directory(&encoded, pointer, geometry);
            rule!(again.as_ref() == Ok(&entries), "encoded and read again: {entries:?} {again:?}");
        }
        for entry in &entries {
            let _ = (entry.unusable(1 << 30, geometry), entry.table_bytes());
        }
    }
}

fn l2(input: &mut Bytes<'_>) {
    let geometry = geometry(input);
    let entry = L2Entry { descriptor: input.u64(), bitmap: if geometry.extended_l2 { input.u64() } else { 0 } };
    let _ = entry.decode_external(geometry, GuestCluster(input.u32().into()));
    if let Ok(state) = entry.decode(geometry) {
        rule!(state.alloc & state.zero == 0, "allocated and zero: {state:?}");
        let clusters = state.host.clusters(geometry);
        rule!(clusters.end.wrapping_sub(clusters.start) <= 2 + (1 << 12), "{state:?} lies in {clusters:?}");
        // What no entry of ours would say: a host cluster without data, for one.
        if state.host != Host::None {
            let again = L2Entry::encode(state, geometry).decode(geometry);
            rule!(again == Ok(state), "encoded and read again: {entry:?} {state:?} {again:?}");
        }
    }
    let size = geometry.l2_entry_bytes() as usize;
    let table = input.rest();
    let mut table = table[..table.len() / size * size].to_vec();
    let _ = l2_table::references(&table, geometry);
    l2_table::rebuild_copied(&mut table, geometry, |cluster| cluster.0 & 1 == 1);
    l2_table::clear_copied(&mut table, geometry);
}

fn counts(input: &mut Bytes<'_>) {
    let order = u32::from(input.u8()) % 7;
    let index = usize::from(input.u8());
    let value = input.u64() & (u64::MAX >> (64 - (1u32 << order)));
    let mut block = input.take(4096).to_vec();
    block.resize(4096, 0);
    let before = block.clone();
    refcount::set(&mut block, order, index, value);
    rule!(refcount::get(&block, order, index) == value, "a count of {value} was not kept");
    let touched = refcount::byte_range(order, index);
    let same = block.iter().zip(&before).enumerate().all(|(at, (a, b))| a == b || touched.contains(&at));
    rule!(same, "counting one cluster changed another");
}

fn stored(input: &mut Bytes<'_>) {
    let method = if input.u8() & 1 == 1 { Compression::Zstd } else { Compression::Zlib };
    let bits = 9 + u32::from(input.u8()) % 13;
    let bytes = input.rest();
    let mut cluster = vec![0x5a; 1 << bits];
    // One for all: what bad data has left in it must not be seen by the next cluster.
    let mut codec = Codec::default();
    let _ = codec.decompress(method, bytes, &mut cluster);
    // And the other way: what is compressed comes back.
    let mut plain = bytes.to_vec();
    plain.resize(1 << bits.min(14), 0);
    let mut packed = vec![0; plain.len() - 1];
    if let Ok(Some(length)) = codec.compress(method, &plain, &mut packed) {
        let mut back = vec![1; plain.len()];
        let unpacked = codec.decompress(method, &packed[..length], &mut back);
        rule!(unpacked == Ok(Ok(())) && back == plain, "compressed, and lost");
    }
}

/// A first cluster as it comes from a disk, with what is read after it.
fn loads(input: &mut Bytes<'_>) {
    let disk = crate::disk::Disk::new(input.rest().to_vec());
    disk.freeze(true);
    let strictly = qcow2::wait::block_on(qcow2::image::load_header(&qcow2::storage::Blocking, &disk));
    let leniently = qcow2::wait::block_on(qcow2::image::load::load_header_leniently(&qcow2::storage::Blocking, &disk));
    rule!(strictly.is_err() || strictly == leniently, "read leniently it is another one");
}
