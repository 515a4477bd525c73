namespace MiniCpmNative.Kernels.Cpu;

/// <summary>The sequences of a packed batch, as operations along them check them.</summary>
internal static class PackedRows
{
    /// <exception cref="ShapeException">
    /// cu_seqlens does not rise from 0 to the tokens.
    /// </exception>
    public static void MustCover(Op op, Matrix<int> starts, int tokens)
    {
        int last = (int)starts.Count - 1;
        for (int s = 0; s <= last; s++)
            if (starts[s] < (s == 0 ? 0 : starts[s - 1]) || starts[s] > tokens
                || (s == 0 && starts[s] > 0) || (s == last && starts[s] < tokens))
                throw new ShapeException($"{op.Name}: cu_seqlens[{s}] is {starts[s]}, expected to "
                    + $"rise from 0 to {tokens}, the tokens");
    }

    /// <summary>A state of generation came into a run that is to be differentiated.</summary>
    public static ShapeException HasNoGradient(Op op) =>
        new($"{op.Name}: state is changed in place, so that a run with it has no backward");

    /// <summary>The sequence of a token.</summary>
    public static int SequenceOf(Matrix<int> starts, int token)
    {
        int s = 0;
        while (starts[s + 1] <= token) s++;
        return s;
    }
}
