namespace MiniCpmNative.Engine.Model;

/// <summary>
/// MiniCPM-Llama3-V 2.5's layout, as its released code has it and its weights were trained: a
/// picture is one row of patches, of which only the first "side" rows of the position table are
/// read. Padded, all pictures are as long as the batch's longest, and since nothing is masked, the
/// zeros take part in attention: a picture's features depend on the pictures beside it.
/// </summary>
/// <param name="Padded">config.json's batch_vision_input; without it each picture is encoded
/// alone.</param>
public sealed record StripLayout(bool Padded) : PatchLayout
{
    public override int Rows(int patches, int longest) => Padded ? longest : patches;

    public override void Positions(int rows, int cols, int side, Span<int> ids) =>
        PositionBuckets.Write(1, ids.Length, side, ids);
}
