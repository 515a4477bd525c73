using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// A tensor of an adapter: its name in the engine (official module, then lora_A.weight, or the
/// plain official parameter), its name in PEFT's file, and whether PEFT may have left it out.
/// </summary>
public sealed record AdapterTensor(string Name, string FileName, Shape Shape,
    bool Optional = false)
{
    /// <summary>
    /// Whether the engine has it transposed: lora_embedding_A, whose columns PEFT looks up.
    /// </summary>
    public bool IsTransposed { get; init; }

    /// <summary>
    /// Of how many experts it is B, whose columns k * experts + e are e's: the engine has the
    /// experts' matrices behind each other.
    /// </summary>
    public int Experts { get; init; }

    /// <summary>Whether the engine has its numbers in another order.</summary>
    public bool IsTurned => IsTransposed || Experts > 0;

    /// <summary>As the engine has it; Shape is the file's.</summary>
    public Shape OwnShape => IsTransposed ? new Shape(Shape[1], Shape[0])
        : Experts > 0 ? new Shape(Experts * Shape[0], Shape[1] / Experts) : Shape;

    /// <summary>A file's numbers in the engine's order.</summary>
    public float[] Own(float[] values) => Turned(values, toFile: false);

    /// <summary>The reverse.</summary>
    public float[] Filed(float[] values) => Turned(values, toFile: true);

    private float[] Turned(float[] values, bool toFile)
    {
        if (!IsTurned) return values;
        var turned = new float[values.Length];
        int rows = Shape[0], cols = Shape[1], rank = Experts > 0 ? cols / Experts : 0;
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < cols; c++)
            {
                int file = (r * cols) + c, own = IsTransposed ? (c * rows) + r
                    : (((c % Experts * rows) + r) * rank) + (c / Experts);
                if (toFile) turned[file] = values[own];
                else turned[own] = values[file];
            }

        return turned;
    }
}

/// <summary>Rows of an embedding, or of the head, that are trained alone.</summary>
public sealed record TokenTarget(LinearModule Module, IReadOnlyList<int> Ids)
{
    public string Name => Module.Name + AdapterLayout.TokensEnd;

    public int Cols => Module.IsTable ? Module.Outputs : Module.Inputs;
}
