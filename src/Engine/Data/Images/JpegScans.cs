namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// A JPEG from its first scan to its end marker, without decoding: whether the end is there, how
/// much work the scans are, and what the built-in decoder would have to find for every pixel to be
/// defined.
/// </summary>
internal sealed class JpegScans
{
    /// <summary>
    /// Samples that all scans together may visit. Cameras and encoders make one scan, or 10 to 20
    /// progressive ones with one component or three each; only attacks make hundreds of a large
    /// picture.
    /// </summary>
    public const long MaxSamples = 4_000_000_000;

    private readonly JpegHeader _header;
    private readonly ByteSource _source;
    private readonly HashSet<int> _begun = [];
    private long _interval, _expectedRestarts, _restarts;

    public JpegScans(JpegHeader header, ByteSource source, ReadOnlySpan<byte> file)
    {
        (_header, _source) = (header, source);
        _interval = header.RestartInterval;
        ReadScan(header.ScanAt);
        long at = header.ScanAt + source.Word(header.ScanAt);
        while (at < file.Length)
        {
            int found = file[(int)at..].IndexOf((byte)0xff);
            if (found < 0 || at + found + 1 >= file.Length) break;
            at += found + 1;
            int marker = file[(int)at];
            if (marker == 0xff) continue;
            at++;
            if (marker is >= 0xd0 and <= 0xd7) _restarts++;
            if (marker == JpegHeader.EoiMarker)
            {
                End = at;
                break;
            }

            if (marker < 0xc0 || !JpegHeader.HasSegment(marker)) continue;
            int length = source.Word(at);
            if (length < 0) break;
            if (marker == JpegHeader.Dri) _interval = source.Word(at + 2);
            if (marker == JpegHeader.SosMarker) ReadScan(at);
            at += length;
        }

        EndScan();
        if (_begun.Count < header.Components) Irregular ??= "a colour component has no pixels";
    }

    /// <summary>
    /// Offset behind the end marker that the decoder looks for; 0 when there is none.
    /// libjpeg-turbo fills up a cut file in silence; Pillow refuses it.
    /// </summary>
    public long End { get; }

    /// <summary>Scans times components times pixels.</summary>
    public long Samples { get; private set; }

    /// <summary>What libjpeg-turbo mends and the built-in decoder would leave undefined.</summary>
    public string? Irregular { get; private set; }

    private void ReadScan(long at)
    {
        EndScan();
        int parts = _source.At(at + 2, 1) is { Length: 1 } count ? count[0] : 0;
        Samples += Math.Max(1, parts) * (long)_header.Width * _header.Height;
        var s = _source.At(at + 3, (2 * parts) + 3);
        if (parts is 0 or > 4 || s.Length < (2 * parts) + 3 || _source.Word(at) != s.Length + 3)
        {
            Irregular ??= "a scan's header is damaged";
            return;
        }

        bool first = !_header.Progressive || (s[^3] == 0 && s[^1] >> 4 == 0);
        for (int i = 0; i < parts; i++)
        {
            if (first) _begun.Add(s[2 * i]);
            else if (!_begun.Contains(s[2 * i]))
                Irregular ??= "a colour component is refined before it is there";
        }

        if (_interval > 0) _expectedRestarts = (Units(s, parts) - 1) / _interval;
    }

    private void EndScan()
    {
        if (_restarts != _expectedRestarts)
            Irregular ??= $"a scan has {_restarts} restart markers, expected {_expectedRestarts}";
        (_restarts, _expectedRestarts) = (0, 0);
    }

    // What a restart interval counts: blocks of 8x8 samples in a scan of one component, otherwise
    // groups of all components' blocks.
    private long Units(ReadOnlySpan<byte> scan, int parts)
    {
        int across = 1, down = 1;
        foreach (var part in _header.Parts)
            (across, down) = (Math.Max(across, part.Across), Math.Max(down, part.Down));
        var (columns, rows) = (8 * across, 8 * down);
        if (parts > 1) return Count(_header.Width, columns) * Count(_header.Height, rows);
        foreach (var part in _header.Parts)
        {
            if (part.Id != scan[0]) continue;
            long width = Count((long)_header.Width * part.Across, across);
            long height = Count((long)_header.Height * part.Down, down);
            return Count(width, 8) * Count(height, 8);
        }

        return 1;
    }

    private static long Count(long length, long by) => (length + by - 1) / by;
}
