namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// The delta rule's kernels, section 15 of kernels.cu: what chunks need before any state, the
/// states along each sequence, and what chunks make of them; backward anew, and the same the other
/// way round. Inputs are those of the operation.
/// </summary>
internal readonly ref struct CudaDeltaRule
{
    private const int Tokens = 64, Margin = 8, Slice = KernelConstants.DeltaSlice;
    private const int LargestHead = KernelConstants.DeltaMostCols, OutputCols = 32;

    private readonly int _keyHeads, _valueHeads, _keyDim, _valueDim, _tokens, _sequences, _chunks;
    private readonly Tensor _starts, _qkv, _gates, _aLog, _dtBias;
    private readonly Tensor _units, _chunkGates, _inverses, _scores, _states, _solved;

    /// <summary>Queues what forward and backward begin with, up to X.</summary>
    /// <exception cref="ShapeException">A head is larger than the kernels' memory.</exception>
    public CudaDeltaRule(
        in CudaCall call, int keyHeads, int valueHeads, int keyDim, int valueDim, in Tensor state)
    {
        (_keyHeads, _valueHeads, _keyDim, _valueDim) = (keyHeads, valueHeads, keyDim, valueDim);
        if (keyDim > LargestHead)
            throw new ShapeException(
                $"delta_rule: key heads of {keyDim} columns, expected 1 to {LargestHead} on a GPU");
        (_qkv, _gates, _aLog, _dtBias) =
            (call.In(0), call.In(1), call.Floats(2), call.Floats(3));
        _starts = call.Input(4);
        (_tokens, _sequences) = (_qkv.Shape[0], (int)_starts.Shape.Count - 1);
        // A sequence's chunks begin at its start / 64 + its number.
        _chunks = (_tokens / Tokens) + _sequences;
        _units = call.Scratch(call.Real, _tokens, 2 * keyHeads * keyDim);
        _chunkGates = call.Scratch(DType.F32, _chunks, valueHeads, 2 * Tokens);
        _inverses = call.Scratch(call.Real, _chunks, valueHeads, Tokens * Tokens);
        _scores = call.Scratch(call.Real, _chunks, valueHeads, Tokens * Tokens);
        _states = call.Scratch(call.Real, _chunks, valueHeads, keyDim * valueDim);
        _solved = call.Scratch(call.Real, _tokens, valueHeads * valueDim);
        if (_chunks == 0) return;
        call.Launch("delta_chunks", Chunks(call, "delta_chunks"), _units, _chunkGates, _inverses,
            _scores, _qkv, _gates, _aLog, _dtBias, _starts, call.Faults, _sequences, _tokens,
            keyHeads, valueHeads, keyDim, valueDim);
        call.Launch("delta_states", Slices(call, "delta_states"), _states, _solved, state, _units,
            _chunkGates, _inverses, _qkv, _starts, _tokens, keyHeads, valueHeads, keyDim, valueDim);
    }

    /// <summary>Dynamic shared memory of a kernel; its elements have `size` bytes.</summary>
    public static int SharedBytes(string kernel, int keyDim, int size)
    {
        int padded = (keyDim + 15) / 16 * 16, keys = Tokens * (padded + Margin);
        int square = Tokens * (Tokens + Margin), values = Tokens * (Slice + Margin);
        int state = padded * (Slice + Margin);
        return kernel switch
        {
            // Keys and queries, then the inverse as floats.
            "delta_chunks" => Math.Max(2 * keys * size, Tokens * (Tokens + 1) * sizeof(float)),
            "delta_states" => size * (keys + square + state + values),
            "delta_output" => size * (keys + square + ((padded + Tokens) * (OutputCols + Margin))),
            "delta_state_gradients" => size * (keys + square + state + (2 * values)),
            "delta_gradients" =>
                size * Math.Max((5 * values) + (2 * state), keys + (2 * square)),
            _ => 0,
        };
    }

    public void Output(in CudaCall call)
    {
        if (_chunks == 0) return;
        call.Launch("delta_output", Chunks(call, "delta_output"), call.Output, _units, _chunkGates,
            _scores, _states, _solved, _starts, _sequences, _tokens, _keyHeads,
            _valueHeads, _keyDim, _valueDim);
    }

    public void Backward(in CudaCall call)
    {
        GradientTarget dQkv = call.Gradient(0), dGates = call.Gradient(1);
        GradientTarget dLog = call.FloatGradient(2), dBias = call.FloatGradient(3);
        Tensor dStates = call.Scratch(call.Real, _chunks, _valueHeads, _keyDim * _valueDim);
        Tensor dSolved = call.Scratch(call.Real, _tokens, _valueHeads * _valueDim);
        Tensor dQueries = call.Scratch(DType.F32, _tokens, _valueHeads * _keyDim);
        Tensor dKeys = call.Scratch(DType.F32, _tokens, _valueHeads * _keyDim);
        Tensor parts = call.Scratch(DType.F32, _chunks, 2 * _valueHeads);
        if (_chunks > 0)
        {
            call.Launch("delta_state_gradients", Slices(call, "delta_state_gradients"), dStates,
                dSolved, call.OutputGradient, _units, _chunkGates, _inverses, _scores,
                _starts, _tokens, _keyHeads, _valueHeads, _keyDim, _valueDim);
            call.Launch("delta_gradients", Chunks(call, "delta_gradients"), dQueries, dKeys,
                dQkv.Buffer, dGates.Buffer, parts, call.OutputGradient, _qkv, _gates, _aLog,
                _dtBias, _units, _chunkGates, _scores, _states, _solved, dStates, dSolved, _starts,
                _sequences, _tokens, _keyHeads, _valueHeads, _keyDim, _valueDim,
                dQkv.Accumulate, dGates.Accumulate);
        }

        const int Warps = 8;
        if (dQkv.Wanted)
            call.Launch("delta_unit_gradients",
                Grid.Blocks256(((2 * _tokens * _keyHeads) + Warps - 1) / Warps), dQkv.Buffer,
                dQueries, dKeys, _qkv, _tokens, _keyHeads, _valueHeads, _keyDim, _valueDim,
                dQkv.Accumulate);
        if (!dLog.Wanted && !dBias.Wanted) return;
        Tensor both = call.Scratch(DType.F32, 2 * _valueHeads);
        call.SumParts(parts, new GradientTarget(both, Accumulate: false));
        Part(call, both, 0, dLog);
        Part(call, both, _valueHeads, dBias);
    }

    // The parameters' gradients lie side by side.
    private void Part(in CudaCall call, in Tensor both, int first, GradientTarget into)
    {
        if (into.Wanted)
            call.SumParts(both.Slice(first, _valueHeads).Reshape(1, _valueHeads), into);
    }

    private Grid Chunks(in CudaCall call, string kernel) =>
        new(new Dim3(_chunks, _valueHeads), 256, SharedBytes(kernel, _keyDim, call.Real.Size()));

    private Grid Slices(in CudaCall call, string kernel) => new(
        new Dim3((_valueDim + Slice - 1) / Slice, _valueHeads, _sequences), 128,
        SharedBytes(kernel, _keyDim, call.Real.Size()));
}
