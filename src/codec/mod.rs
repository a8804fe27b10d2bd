//! Bytes of a cluster as they are stored: compression. Bounded by the cluster, whatever the stored bytes say.

use crate::error::{Error, Result};
use crate::format::Compression;
use crate::storage::IoDst;

/// Why stored bytes could not be turned back into a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadData;

/// What decompressing and compressing needs beside the bytes: states that cost more to build than a small cluster
/// costs to decompress. Each is built when it is first needed, and starts every cluster from the beginning, whatever
/// became of the one before. At most about 2 MiB.
#[derive(Default)]
pub struct Codec {
    inflate: Option<zlib_rs::Inflate>,
    deflate: Option<zlib_rs::Deflate>,
    #[cfg(feature = "zstd")]
    unzstd: Option<zstd_safe::DCtx<'static>>,
    #[cfg(feature = "zstd")]
    zstd: Option<zstd_safe::CCtx<'static>>,
}

impl Codec {
    /// Decompresses one cluster. `stored` may be followed by bytes of other clusters: decompression stops when `cluster`
    /// is full (spec, "Compressed Clusters Descriptor"), and it must become exactly full.
    pub fn decompress(
        &mut self,
        method: Compression,
        stored: &[u8],
        cluster: &mut [u8],
    ) -> Result<std::result::Result<(), BadData>> {
        match method {
            Compression::Zlib => Ok(self.inflate(stored, cluster)),
            Compression::Zstd => self.unzstd(stored, IoDst::from(cluster)),
        }
    }

    /// As [`Codec::decompress`], to memory of the caller, which may change meanwhile. `None`: not with this method, whose
    /// decoder takes a reference.
    pub fn decompress_to(
        &mut self,
        method: Compression,
        stored: &[u8],
        cluster: IoDst<'_>,
    ) -> Option<Result<std::result::Result<(), BadData>>> {
        (method == Compression::Zstd).then(|| self.unzstd(stored, cluster))
    }

    /// Compresses one cluster into the start of `stored`, which is one byte shorter; returns how many bytes it became,
    /// or `None` if that is no less than it was.
    pub fn compress(&mut self, method: Compression, cluster: &[u8], stored: &mut [u8]) -> Result<Option<usize>> {
        debug_assert!(stored.len() < cluster.len());
        match method {
            Compression::Zlib => Ok(self.deflate(cluster, stored)),
            Compression::Zstd => self.zstd(cluster, stored),
        }
    }

    /// Raw deflate without a zlib header. Any window is accepted; QEMU writes 12 bits.
    fn inflate(&mut self, stored: &[u8], cluster: &mut [u8]) -> std::result::Result<(), BadData> {
        let stream = self.inflate.get_or_insert_with(|| zlib_rs::Inflate::new(false, 15));
        stream.reset(false);
        let status = stream.decompress(stored, cluster, zlib_rs::InflateFlush::Finish);
        if status.is_err() || stream.total_out() != cluster.len() as u64 { Err(BadData) } else { Ok(()) }
    }

    /// Raw deflate with a window of 12 bits: QEMU's inflate refuses any that is larger.
    fn deflate(&mut self, cluster: &[u8], stored: &mut [u8]) -> Option<usize> {
        let config = zlib_rs::DeflateConfig { level: 6, window_bits: -12, mem_level: 9, ..Default::default() };
        let stream = self.deflate.get_or_insert_with(|| zlib_rs::Deflate::new_with_config(config));
        stream.reset();
        match stream.compress(cluster, stored, zlib_rs::DeflateFlush::Finish) {
            Ok(zlib_rs::Status::StreamEnd) => Some(stream.total_out() as usize),
            _ => None, // no room for the rest
        }
    }
}

/// Memory that zstd decodes to. Its decoder is C, and what it finds in memory that it has filled becomes output, never an
/// offset or a length: what somebody else writes there meanwhile spoils the bytes, and nothing else.
#[cfg(feature = "zstd")]
struct Room<'a>(IoDst<'a>);

// SAFETY: the piece's maker promised that so many bytes are valid for writing. Nothing is said to be initialized.
#[cfg(feature = "zstd")]
unsafe impl zstd_safe::WriteBuf for Room<'_> {
    fn as_slice(&self) -> &[u8] {
        &[]
    }

    fn capacity(&self) -> usize {
        self.0.len()
    }

    fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.base()
    }

    unsafe fn filled_until(&mut self, _: usize) {}
}

#[cfg(feature = "zstd")]
impl Codec {
    /// One or more frames, each decoded in one go, so that no window the frame asks for has to be allocated.
    fn unzstd(&mut self, mut stored: &[u8], cluster: IoDst<'_>) -> Result<std::result::Result<(), BadData>> {
        let context = self.unzstd.get_or_insert_with(zstd_safe::DCtx::create);
        let mut done = 0;
        while done < cluster.len() {
            let Ok(frame) = zstd_safe::find_frame_compressed_size(stored) else { return Ok(Err(BadData)) };
            let Some((frame, rest)) = stored.split_at_checked(frame) else { return Ok(Err(BadData)) };
            match context.decompress(&mut Room(cluster.slice(done, cluster.len() - done)), frame) {
                Ok(n) if n > 0 || !rest.is_empty() => done += n,
                _ => return Ok(Err(BadData)),
            }
            stored = rest;
        }
        Ok(Ok(()))
    }

    fn zstd(&mut self, cluster: &[u8], stored: &mut [u8]) -> Result<Option<usize>> {
        let context = self.zstd.get_or_insert_with(zstd_safe::CCtx::create);
        Ok(context.compress(stored, cluster, zstd_safe::CLEVEL_DEFAULT).ok())
    }
}

#[cfg(not(feature = "zstd"))]
impl Codec {
    fn unzstd(&mut self, _: &[u8], _: IoDst<'_>) -> Result<std::result::Result<(), BadData>> {
        check_supported(Compression::Zstd).map(|()| Err(BadData))
    }

    fn zstd(&mut self, _: &[u8], _: &mut [u8]) -> Result<Option<usize>> {
        check_supported(Compression::Zstd).map(|()| None)
    }
}

/// About how long it takes to decompress so many bytes.
pub fn decompress_micros(method: Compression, bytes: u64) -> u64 {
    match method {
        Compression::Zlib => bytes / 400,
        Compression::Zstd => bytes / 1000,
    }
}

/// About how long it takes to compress so many bytes.
pub fn compress_micros(method: Compression, bytes: u64) -> u64 {
    match method {
        Compression::Zlib => bytes / 100,
        Compression::Zstd => bytes / 250,
    }
}

/// Whether clusters compressed with `method` can be read and written by this build.
pub fn is_supported(method: Compression) -> bool {
    method == Compression::Zlib || cfg!(feature = "zstd")
}

/// Refuses a method that this build cannot read.
pub fn check_supported(method: Compression) -> Result<()> {
    if is_supported(method) {
        return Ok(());
    }
    Err(Error::Unsupported { feature: "zstd compression (this build of the library is without it)".into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decompress(method: Compression, stored: &[u8], cluster: &mut [u8]) -> Result<std::result::Result<(), BadData>> {
        Codec::default().decompress(method, stored, cluster)
    }

    fn compress(method: Compression, cluster: &[u8]) -> Result<Option<Vec<u8>>> {
        let mut stored = vec![0; cluster.len() - 1];
        let length = Codec::default().compress(method, cluster, &mut stored)?;
        Ok(length.map(|length| stored[..length].to_vec()))
    }

    /// One that has done all kinds of things, and failed at some, does the same as a new one.
    #[test]
    fn nothing_is_left_of_the_cluster_before() {
        let mut codec = Codec::default();
        for method in [Compression::Zlib, Compression::Zstd].into_iter().filter(|&method| is_supported(method)) {
            for round in 0..60usize {
                let size = 512 << (round % 8);
                let mut cluster = noise(size + round)[round..].to_vec();
                cluster[..size - size / (1 + round % 7)].fill(round as u8);
                let mut room = vec![0xaa; size - 1];
                let length = codec.compress(method, &cluster, &mut room).unwrap();
                assert_eq!(length.map(|length| room[..length].to_vec()), compress(method, &cluster).unwrap());
                let Some(length) = length else { continue };
                let mut found = vec![0xaa; size];
                match round % 4 {
                    0 => assert_eq!(codec.decompress(method, &room[..length / 2], &mut found), Ok(Err(BadData))),
                    1 => {
                        assert_eq!(codec.decompress(method, &room[..length], &mut vec![0; 2 * size]), Ok(Err(BadData)))
                    }
                    2 => drop(codec.decompress(method, &room[..length], &mut found[..size / 2])),
                    _ => drop(codec.decompress(method, &cluster, &mut found)),
                }
                assert_eq!(codec.decompress(method, &room[..length], &mut found), Ok(Ok(())));
                assert!(found == cluster, "{method:?}, round {round}");
            }
        }
    }

    /// "stored" deflate block of 5 bytes: 01 05 00 fa ff "hello".
    const HELLO: &[u8] = &[1, 5, 0, 0xfa, 0xff, b'h', b'e', b'l', b'l', b'o', 0xaa, 0xbb];

    #[test]
    fn deflate_must_fill_the_cluster_exactly() {
        let mut cluster = [0; 5];
        assert_eq!(decompress(Compression::Zlib, HELLO, &mut cluster), Ok(Ok(())));
        assert_eq!(&cluster, b"hello");
        assert_eq!(decompress(Compression::Zlib, HELLO, &mut [0; 6]), Ok(Err(BadData)), "too little");
        assert_eq!(decompress(Compression::Zlib, &HELLO[..8], &mut [0; 5]), Ok(Err(BadData)), "cut off");
        assert_eq!(decompress(Compression::Zlib, &[7; 9], &mut [0; 5]), Ok(Err(BadData)), "garbage");
    }

    #[test]
    fn what_was_compressed_is_smaller_and_comes_back() {
        let methods = [Compression::Zlib, Compression::Zstd].into_iter().filter(|&method| is_supported(method));
        for (method, bits) in methods.flat_map(|method| (9..=21).map(move |bits| (method, bits))) {
            let size = 1usize << bits;
            let text: Vec<u8> = (0..size).map(|i| b"a cluster of text, "[i % 19] ^ (i / 4000) as u8).collect();
            let half: Vec<u8> =
                noise(size).into_iter().enumerate().map(|(i, b)| if i < size / 2 { b } else { 0 }).collect();
            for cluster in [vec![0; size], text, half] {
                let mut stored = compress(method, &cluster).unwrap().expect("it becomes smaller");
                assert!(stored.len() < size);
                let length = stored.len();
                stored.extend(noise(700)); // of the next cluster
                let mut found = vec![0xaa; size];
                assert_eq!(decompress(method, &stored, &mut found), Ok(Ok(())));
                assert!(found == cluster, "{method:?}, {size} bytes");
                let cut = decompress(method, &stored[..length / 2], &mut found);
                assert_eq!(cut, Ok(Err(BadData)), "{method:?}: half of it is not enough");
            }
            assert_eq!(compress(method, &noise(size)), Ok(None), "{method:?}: noise does not become smaller");
        }
    }

    #[test]
    fn the_window_has_12_bits() {
        let size = 64 << 10;
        let cluster = [noise(size / 2), noise(size / 2)].concat();
        // What repeats after 32 KiB is out of sight; after 3000 bytes, it is not.
        assert_eq!(compress(Compression::Zlib, &cluster), Ok(None));
        let cluster: Vec<u8> = noise(3000).into_iter().cycle().take(size).collect();
        let stored = compress(Compression::Zlib, &cluster).unwrap().unwrap();
        assert!(stored.len() < 10_000, "{}", stored.len());
        let mut found = vec![0; size];
        let config = zlib_rs::InflateConfig { window_bits: -12 };
        let (found, _) = zlib_rs::decompress_slice(&mut found, &stored, config);
        assert!(found == cluster);
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut word = 1u64;
        let mut next = || {
            word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (word >> 56) as u8
        };
        (0..length).map(|_| next()).collect()
    }

    #[cfg(feature = "zstd")]
    #[test]
    fn zstd_frames_are_joined_and_bounded() {
        let frame = |bytes: &[u8]| {
            let mut out = vec![0; 1000];
            let n = zstd_safe::compress(&mut out[..], bytes, 3).unwrap();
            out.truncate(n);
            out
        };
        let mut stored = frame(b"hel");
        stored.extend(frame(b"lo"));
        stored.extend([0xaa; 7]);
        let mut cluster = [0; 5];
        assert_eq!(decompress(Compression::Zstd, &stored, &mut cluster), Ok(Ok(())));
        assert_eq!(&cluster, b"hello");
        assert_eq!(decompress(Compression::Zstd, &stored, &mut [0; 6]), Ok(Err(BadData)));
        let bomb = frame(&[0; 100_000]);
        assert_eq!(decompress(Compression::Zstd, &bomb, &mut [0; 512]), Ok(Err(BadData)));
        assert_eq!(decompress(Compression::Zstd, &[], &mut [0; 512]), Ok(Err(BadData)));
    }
}
