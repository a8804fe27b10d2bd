//! The seeds: sound small images of every kind, made once a run by the library itself, each with a map of where its
//! structures lie, so that patches can be aimed.

use std::ops::Range;
use std::sync::{Arc, LazyLock};

use qcow2::format::l2::decode_l1;
use qcow2::format::{Compression, Header};
use qcow2::image::options::{BackingFormat, Compat};
use qcow2::image::{CreateOptions, OpenOptions, SnapshotFacts, WriteFlags, ZeroFlags, create_with_data_file};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::{Blocking, IoSrc, Storage};
use qcow2::{Image, format};

use crate::disk::Disk;

/// A sound image.
pub struct Seed {
    pub name: &'static str,
    pub bytes: Vec<u8>,
    pub cluster: u64,
    /// What lies under it.
    pub backing: Option<Vec<u8>>,
    /// Its external data file.
    pub data: Option<Vec<u8>>,
    /// What the guest reads.
    pub content: Vec<u8>,
    /// Metadata, by structure.
    pub areas: Vec<Range<usize>>,
}

/// What an image is given beside data.
#[derive(Clone, Copy, Default)]
struct Recipe {
    name: &'static str,
    cluster_bits: u32,
    clusters: u64,
    extended: bool,
    v2: bool,
    lazy: bool,
    zstd: bool,
    refcount_bits: u32,
    backing: bool,
    data_file: bool,
    raw: bool,
    snapshots: bool,
    bitmaps: bool,
    compressed: bool,
}

const STANDARD: Recipe = Recipe {
    name: "",
    cluster_bits: 12,
    clusters: 20,
    extended: false,
    v2: false,
    lazy: false,
    zstd: false,
    refcount_bits: 16,
    backing: false,
    data_file: false,
    raw: false,
    snapshots: false,
    bitmaps: false,
    compressed: true,
};

/// Their order is part of the meaning of kept inputs: new ones come last.
const RECIPES: [Recipe; 14] = [
    Recipe { name: "plain", ..STANDARD },
    Recipe { name: "512 with snapshots", cluster_bits: 9, clusters: 150, snapshots: true, ..STANDARD },
    Recipe { name: "extended", cluster_bits: 14, clusters: 9, extended: true, ..STANDARD },
    Recipe { name: "extended, backing", cluster_bits: 14, clusters: 9, extended: true, backing: true, ..STANDARD },
    Recipe { name: "snapshots and bitmaps", snapshots: true, bitmaps: true, ..STANDARD },
    Recipe { name: "zstd, snapshots", zstd: true, snapshots: true, refcount_bits: 4, ..STANDARD },
    Recipe { name: "version 2", v2: true, snapshots: true, ..STANDARD },
    Recipe { name: "refcounts of 1 bit", refcount_bits: 1, cluster_bits: 9, compressed: false, ..STANDARD },
    Recipe { name: "refcounts of 64 bits", refcount_bits: 64, cluster_bits: 9, bitmaps: true, ..STANDARD },
    Recipe { name: "data file", data_file: true, compressed: false, bitmaps: true, ..STANDARD },
    Recipe { name: "raw data file", data_file: true, raw: true, compressed: false, ..STANDARD },
    Recipe { name: "lazy", lazy: true, snapshots: true, refcount_bits: 8, ..STANDARD },
    Recipe { name: "64k", cluster_bits: 16, clusters: 6, snapshots: true, bitmaps: true, ..STANDARD },
    Recipe {
        name: "32k, extended, all of it",
        cluster_bits: 15,
        clusters: 7,
        extended: true,
        zstd: true,
        snapshots: true,
        bitmaps: true,
        backing: true,
        ..STANDARD
    },
];

/// All of them.
pub static SEEDS: LazyLock<Vec<Seed>> = LazyLock::new(|| RECIPES.iter().map(make).collect());

/// Bytes that compress well, but not to nothing.
fn text(length: u64, salt: u64) -> Vec<u8> {
    (0..length).map(|i| if i % 61 < 40 { 0x40 } else { (i * i / 97 + salt) as u8 }).collect()
}

pub fn open_options(seed: &Seed) -> OpenOptions {
    let memory = |bytes: &Vec<u8>| Arc::new(Disk::new(bytes.clone())) as Arc<dyn Storage>;
    OpenOptions {
        backing_storages: seed.backing.iter().map(memory).collect(),
        data_file_storages: seed.data.iter().map(memory).map(Some).collect(),
        l2_cache_size: 128 << 10,
        refcount_cache_size: 128 << 10,
        check_memory: 1 << 20,
        ..OpenOptions::default()
    }
}

fn make(recipe: &Recipe) -> Seed {
    let cluster = 1u64 << recipe.cluster_bits;
    let size = recipe.clusters * cluster + 512;
    let backing = recipe.backing.then(|| text(size - cluster, 3));
    let options = CreateOptions {
        cluster_size_bytes: cluster,
        extended_l2: recipe.extended,
        refcount_bits: recipe.refcount_bits,
        compat: if recipe.v2 { Compat::V2 } else { Compat::V3 },
        lazy_refcounts: recipe.lazy,
        backing_file: backing.as_ref().map(|_| "base".to_owned()),
        backing_fmt: backing.as_ref().map(|_| BackingFormat::Raw),
        data_file: recipe.data_file.then(|| "data".to_owned()),
        data_file_raw: recipe.raw,
        compression_type: if recipe.zstd { Compression::Zstd } else { Compression::Zlib },
        ..CreateOptions::default()
    };
    let storage = Arc::new(MemoryStorage::default());
    let data = recipe.data_file.then(|| Arc::new(MemoryStorage::default()));
    let data_dyn = data.as_ref().map(|data| &**data as &dyn Storage);
    let made = create_with_data_file(&Blocking, &*storage, data_dyn, size, &options, None);
    qcow2::wait::block_on(made).unwrap_or_else(|e| panic!("{}: {e}", recipe.name));
    let below = backing.iter().map(|b| Arc::new(MemoryStorage::new(b.clone())) as Arc<dyn Storage>);
    let open = OpenOptions {
        backing_storages: below.collect(),
        data_file_storages: data.iter().map(|data| Some(Arc::clone(data) as Arc<dyn Storage>)).collect(),
        ..OpenOptions::default()
    };
    let image = Image::open_storage(storage.clone(), &open).unwrap_or_else(|e| panic!("{}: {e}", recipe.name));
    fill(&image, recipe, cluster);
    let mut content = vec![0; size as usize];
    image.pread(&mut content, 0).expect("a sound image reads");
    image.close().expect("a sound image closes");
    let (bytes, data) = (storage.snapshot(), data.map(|data| data.snapshot()));
    let areas = areas(&bytes);
    Seed { name: recipe.name, bytes, cluster, backing, data, content, areas }
}

/// Guest clusters: 0 and 1 data, 2 and 3 compressed, 4 zero, 5 nothing, 6 in part; more of it after a snapshot.
fn fill(image: &Image, recipe: &Recipe, cluster: u64) {
    let write = |byte: u8, at: u64, length: u64| image.pwrite(&vec![byte; length as usize], at).expect("a write");
    write(1, 0, 2 * cluster);
    if recipe.compressed {
        let bytes = text(2 * cluster, 5);
        let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
        image.write(&[IoSrc::from(&bytes[..])], format::GuestOffset(2 * cluster), flags).expect("a compressed write");
    }
    if !recipe.v2 {
        image.write_zeroes(4 * cluster, cluster, ZeroFlags::default()).expect("zeroes");
    }
    write(6, 6 * cluster - 512, 512);
    write(7, recipe.clusters * cluster, 512);
    if recipe.bitmaps {
        image.bitmap_add("one", Default::default()).expect("a bitmap");
        let disabled = qcow2::image::bitmaps::BitmapOptions { granularity_bytes: 512, disabled: true };
        image.bitmap_add("two", disabled).expect("a bitmap");
    }
    if recipe.snapshots {
        image.snapshot_create("first", &SnapshotFacts::default()).expect("a snapshot");
        write(8, cluster, cluster);
        image.snapshot_create("second", &SnapshotFacts::default()).expect("a snapshot");
    }
    write(9, 0, 1024);
    image.flush().expect("a flush");
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).map_or(0, |word| u64::from_be_bytes(word.try_into().expect("eight bytes")))
}

/// Header, L1 table, L2 tables, refcount table, refcount blocks, snapshot table, and what the bitmaps extension leads
/// to. Of long ones the start, where what is in use is.
fn areas(bytes: &[u8]) -> Vec<Range<usize>> {
    let header = Header::parse(&bytes[..bytes.len().min(2 << 20)]).expect("a sound header");
    let geometry = header.geometry;
    let cluster = geometry.cluster_size_bytes() as usize;
    let l1 = header.l1_offset.0 as usize;
    let table = header.refcount_table_offset.0 as usize;
    let mut areas = vec![0..112, 104..360, l1..l1 + header.l1_entries as usize * 8, table..table + 64];
    if header.snapshots > 0 {
        areas.push(header.snapshots_offset.0 as usize..header.snapshots_offset.0 as usize + 256);
    }
    for entry in 0..header.l1_entries as usize {
        if let Ok((l2, _)) = decode_l1(word(bytes, l1 + entry * 8), geometry)
            && l2.0 != 0
        {
            areas.push(l2.0 as usize..l2.0 as usize + cluster.min(512));
        }
    }
    let block = word(bytes, table) as usize;
    areas.push(block..block + cluster.min(128));
    if let Ok(Some(pointer)) = qcow2::bitmap::stored::pointer(&header) {
        let directory = pointer.directory_offset as usize;
        areas.push(directory..directory + pointer.directory_bytes as usize);
        areas.push(word(bytes, directory) as usize..word(bytes, directory) as usize + 64);
    }
    areas.retain(|area| area.end <= bytes.len());
    areas
}
