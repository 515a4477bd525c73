using System.Runtime.InteropServices;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// A sequence of blocks whose weights lie in host memory and pass through two buffers of the
/// device, blocks in turn. While one block is computed with, its neighbour in the direction of the
/// run comes over on the copy stream. Events keep order: computing waits for the copy, and a copy
/// until all work on what was in its buffer has run. Backward begins with the blocks that forward
/// ended with, the last two, which are still there; so are the first two for the next forward.
///
/// A block is loaded as any tensors are, into its buffer, and what lies there then is kept in host
/// memory: each kind of weight streams without knowing. Host memory is page-locked, which copies
/// at the speed of the bus need; where the driver refuses more of it, the rest is not, and the host
/// waits for each copy of that.
///
/// Trained tensors lie in host memory where the optimizer finds them. They come as frozen ones do;
/// their gradients have buffers of their own, and go to host memory, on a third stream, when
/// backward has come to the next block. Where a step comes back to a block, they come over first.
/// </summary>
internal sealed unsafe partial class CudaWeightStream : IDisposable
{
    // A buffer is made of pieces, the first that has room takes a tensor: larger ones have a piece
    // of their own.
    private const long PieceBytes = 4 << 20, Alignment = 256;

    private readonly CudaDevice _device;
    private readonly CudaStream _copy, _back;
    private readonly Half[] _halves;
    private readonly List<Block> _blocks = [];
    private int _last, _next;

    /// <param name="device">Computes with the blocks.</param>
    /// <param name="copy">Brings them.</param>
    /// <param name="back">Takes gradients back.</param>
    public CudaWeightStream(CudaDevice device, CudaStream copy, CudaStream back)
    {
        (_device, _copy, _back) = (device, copy, back);
        _halves = [new(device.Context), new(device.Context)];
    }

    /// <summary>Bytes of all blocks, those of trained tensors not counted.</summary>
    public long Bytes { get; private set; }

    /// <summary>Bytes of them whose host memory is not page-locked.</summary>
    public long PageableBytes { get; private set; }

    /// <summary>Bytes that were copied to the device so far.</summary>
    public long CopiedBytes { get; private set; }

    /// <summary>Bytes of gradients that were copied back so far.</summary>
    public long CopiedBack { get; private set; }

    /// <summary>What is reserved until its end is the new block's.</summary>
    /// <param name="hasContent">False for a device that only counts.</param>
    public Block Begin(bool hasContent)
    {
        var block = new Block(this, _blocks.Count, hasContent);
        _blocks.Add(block);
        Half half = _halves[block.Number % 2];
        half.Frozen.Restart();
        half.Visiting.Restart();
        half.Holder = block;
        return block;
    }

    public void Dispose()
    {
        foreach (Half half in _halves) half.Dispose();
        foreach (Block block in _blocks) block.Dispose();
    }

    private nint Reserve(Room room, long bytes)
    {
        if (room.Take(bytes) is { } data) return data;
        var slab = new DeviceSlab(_device.Context, Math.Max(Room.Rounded(bytes), PieceBytes));
        // What lies between tensors goes to host memory and back too.
        _device.Stream.Fill(slab.Address, 0, slab.Bytes);
        room.Pieces.Add(new(slab));
        return room.Take(bytes)!.Value;
    }

    // Behind the uploads that are queued, and before those of the buffer's next block.
    private void Keep(Block block)
    {
        Half half = _halves[block.Number % 2];
        foreach (Piece piece in half.Frozen.Pieces)
        {
            if (piece.Used == 0) continue;
            var part = new Part(piece.Slab.Address, piece.Used);
            if (block.HasContent)
            {
                part = Host(part);
                _device.Stream.Download((void*)part.Host, part.Device, part.Bytes);
            }

            block.Parts.Add(part);
            Bytes += part.Bytes;
        }

        half.Free.Record(_device.Stream);
        half.There.Record(_device.Stream);
        half.Back.Record(_device.Stream);
    }

    private Part Host(Part part)
    {
        if (PageableBytes == 0)
        {
            try
            {
                var pinned = new PinnedMemory(_device.Context, part.Bytes);
                return part with { Pinned = pinned, Host = (nint)pinned.Pointer };
            }
            catch (Exception refused) when (refused is CudaException or DeviceMemoryException)
            {
                // As told by PageableBytes.
            }
        }

        try
        {
            void* host = NativeMemory.AlignedAlloc((nuint)part.Bytes, 4096);
            PageableBytes += part.Bytes;
            return part with { Host = (nint)host };
        }
        catch (OutOfMemoryException)
        {
            throw new DeviceMemoryException($"the machine has no {part.Bytes:N0} bytes more for "
                + $"streamed weights, of which it holds {Bytes:N0}; stream_weights=false keeps "
                + "them on the GPU");
        }
    }

    private void Acquire(Block block, bool backward)
    {
        int number = block.Number;
        if (number == 0) _next = 1;
        else if (number == _blocks.Count - 1) _next = number - 1;
        else if (number != _last) _next = number + Math.Sign(number - _last);
        _last = number;
        Bring(block);
        if (backward) Learn(block);
        _device.Stream.Wait(_halves[number % 2].There);
        if (_next < _blocks.Count) Bring(_blocks[_next]);
    }

    private void Bring(Block block)
    {
        Half half = _halves[block.Number % 2];
        if (half.Holder == block) return;
        _copy.Wait(half.Free);
        foreach (ref readonly Part part in CollectionsMarshal.AsSpan(block.Parts)) Upload(part);
        foreach (ref readonly Part part in CollectionsMarshal.AsSpan(block.Values)) Upload(part);
        half.There.Record(_copy);
        half.Holder = block;
    }

    private void Upload(in Part part)
    {
        if (part.IsOnDevice) _copy.Copy(part.Device, (ulong)part.Host, part.Bytes);
        else _copy.Upload(part.Device, (void*)part.Host, part.Bytes);
        CopiedBytes += part.IsOnDevice ? 0 : part.Bytes;
    }

    private void Release(Block block) => _halves[block.Number % 2].Free.Record(_device.Stream);

    public sealed class Block(CudaWeightStream stream, int number, bool hasContent)
        : StreamedBlock, IDisposable
    {
        public int Number => number;

        public bool HasContent => hasContent;

        /// <summary>Frozen tensors.</summary>
        public List<Part> Parts { get; } = [];

        /// <summary>Trained ones.</summary>
        public List<Part> Values { get; } = [];

        /// <summary>Their gradients.</summary>
        public List<Part> Gradients { get; } = [];

        /// <summary>Whether what is at the gradients' home is of this step.</summary>
        public bool HasGradients { get; set; }

        public nint Reserve(long bytes) =>
            stream.Reserve(stream._halves[number % 2].Frozen, bytes);

        public nint ReserveVisiting(long bytes) =>
            stream.Reserve(stream._halves[number % 2].Visiting, bytes);

        /// <summary>A trained tensor, or a gradient, has its place.</summary>
        public void Visit(in Part part, bool isGradient)
        {
            stream._trains = true;
            (isGradient ? Gradients : Values).Add(part);
        }

        public override void End()
        {
            stream._device.EndStreamed();
            stream.Keep(this);
        }

        public override void Acquire(bool backward) => stream.Acquire(this, backward);

        public override void Release() => stream.Release(this);

        public void Dispose()
        {
            foreach (Part part in Parts)
            {
                if (part.Pinned is not null) part.Pinned.Dispose();
                else NativeMemory.AlignedFree((void*)part.Host);
            }

            Parts.Clear();
        }
    }

    /// <summary>Bytes in a row on the device, and where they are kept.</summary>
    public readonly record struct Part(ulong Device, long Bytes)
    {
        public PinnedMemory? Pinned { get; init; }

        public nint Host { get; init; }

        /// <summary>They are kept on the device after all: the host had no memory for them.
        /// </summary>
        public bool IsOnDevice { get; init; }
    }

    private sealed class Piece(DeviceSlab slab)
    {
        public DeviceSlab Slab => slab;

        /// <summary>By the block that is being made.</summary>
        public long Used { get; set; }
    }

    /// <summary>Device memory that blocks take in turn.</summary>
    private sealed class Room : IDisposable
    {
        public List<Piece> Pieces { get; } = [];

        public static long Rounded(long bytes) =>
            Math.Max(Alignment, (bytes + Alignment - 1) / Alignment * Alignment);

        public void Restart()
        {
            foreach (Piece piece in Pieces) piece.Used = 0;
        }

        /// <summary>The first place that is free; null where none is.</summary>
        public nint? Take(long bytes)
        {
            long rounded = Rounded(bytes);
            Piece? piece = Pieces.Find(p => p.Slab.Bytes - p.Used >= rounded);
            if (piece is null) return null;
            nint data = (nint)piece.Slab.Address + (nint)piece.Used;
            piece.Used += rounded;
            return data;
        }

        public void Dispose()
        {
            foreach (Piece piece in Pieces) piece.Slab.Dispose();
        }
    }

    private sealed class Half(CudaContext context) : IDisposable
    {
        public Room Frozen { get; } = new();

        /// <summary>Of trained tensors and their gradients.</summary>
        public Room Visiting { get; } = new();

        /// <summary>Whose weights are there, or on their way.</summary>
        public Block? Holder { get; set; }

        /// <summary>Whose gradients are there, and not at home.</summary>
        public Block? Learner { get; set; }

        /// <summary>They have come.</summary>
        public CudaEvent There { get; } = new(context);

        /// <summary>All work on them has run.</summary>
        public CudaEvent Free { get; } = new(context);

        /// <summary>Gradients have gone home.</summary>
        public CudaEvent Back { get; } = new(context);

        public void Dispose()
        {
            Frozen.Dispose();
            Visiting.Dispose();
            There.Dispose();
            Free.Dispose();
            Back.Dispose();
        }
    }
}
